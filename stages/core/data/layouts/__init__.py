"""One module a kind of label files; `recognition` tells them apart."""
