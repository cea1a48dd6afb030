"""The objects that Flower looks for in the bundle. Everything they do is in `fl_coordinator.flower`."""

from fl_coordinator.flower import client_app, server_app

server = server_app()
client = client_app()
