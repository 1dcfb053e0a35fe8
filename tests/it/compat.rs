//! Clients of other systems, byte by byte over real sockets.

mod ganomede;
