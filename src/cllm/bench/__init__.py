"""One file a claim: each measures it on this machine, beside its peers."""
