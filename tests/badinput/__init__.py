"""Bad input, hostile neighbours and crashes, against the real product: what must hold when everything else goes wrong."""
