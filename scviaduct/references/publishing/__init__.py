"""Publishing a package as a repository of scvi-hub: what is in it, what stays at home, its card, and the upload."""
