//! The real `edgectl` against the real socket server and the real line console. What stands in for the agent's loop is
//! a thread that answers calls: the loop itself is another room.

/// The line console on a pseudo-terminal.
mod console;
/// The thread that answers, and the programs around it.
mod rig;
/// The local socket.
mod socket;
