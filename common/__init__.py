"""The ground floor: settings, command line, errors, files, devices, processes. Imports nothing of the stages."""
