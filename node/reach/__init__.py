"""Being reached: NATs, relays, holes, WebRTC, port mapping."""
