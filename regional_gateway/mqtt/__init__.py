"""The embedded MQTT 5 broker: what it decides, and the sockets and files it decides it for."""
