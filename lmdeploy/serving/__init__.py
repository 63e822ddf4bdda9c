"""HTTP: the server of one model (`server`, `app`, `options`) and a client (`client`). Nothing is imported here: the command line reads `options` only."""
