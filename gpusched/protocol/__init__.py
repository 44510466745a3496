"""The wire: JSON lines over a Unix stream socket. Standard library only in ``codec``; see docs/protocol.md."""
