"""A real federation: the functions of the simulation on machines of their own, over Flower.

`apps.py` holds the ServerApp and the ClientApp, `server.py` the server's side of a round and `site.py` a site's, both
without Flower; `loopback.py` starts a whole federation on one machine. See docs/deploy.md.
"""
