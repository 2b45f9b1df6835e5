"""Many images through a bundle's own cascade in this process, with no server: a folder, a list of files, a data set.
`cascade` is the API, the rest is `dvt batch`."""
