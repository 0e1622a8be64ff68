"""The ground floor: errors and exit codes, flags, atomic files, typed tables, settings of the process."""
