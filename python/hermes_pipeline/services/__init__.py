"""What costs time or money: servers, endpoints, data sets, disks."""
