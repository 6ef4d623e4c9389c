"""The runners: read records, run a stage, write records.  The only modules that open files."""
