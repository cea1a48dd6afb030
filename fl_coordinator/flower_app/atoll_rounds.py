"""The objects that Flower looks for in the bundle. Everything they do is in `fl_coordinator.flower_carrier`."""

from fl_coordinator.flower_carrier import client_app, server_app

server = server_app()
client = client_app()
