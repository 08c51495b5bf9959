// Package ike is the key daemon: the sockets of IKEv2, the demultiplexing of
// messages to IKE SAs, the defence of RFC 7296, 2.6 against floods, and the
// connection to missiu by PF_KEY. The protocol itself is pkg/ike/sa, a machine
// without I/O; this package feeds it and carries out what it says. Only cmd/ike
// calls it.
//
//	socket readers --datagram-->      lineage      <--events-- Run <-- PF_KEY events
//	  (demultiplex,               owns one sa.SA,              (policies, ACQUIRE,
//	   cookies, budget)            one timer)                    EXPIRE, reconnect)
//	                                  |  sends, GETSPI, ADD, UPDATE, DELETE
//
// Goroutines: one reader per socket; Run itself; and one for each lineage, that is
// an IKE SA and what it becomes by rekeying, while it has something to do. At rest
// it has none, since that would keep a stack: see inbox. Shared state is the tables of
// Daemon, behind one mutex that is never held over I/O or a call of the machine.
//
// An operator reaches the daemon by Control, which pkg/ike/control serves on a
// socket: status (report.go), up, down and rekey (ops.go), each of which waits by a
// ticket for what lineages say. Besides the machine a lineage keeps timers of its
// own: reauthentication, which takes another lineage, and idle child SAs (reauth.go).
// A Journal remembers which SAs in missiu are ours, for an ike that comes after one
// that was killed; a KeyLog, if the operator wants one, takes the keys.
//
// What others can make us log is bounded by source: limiter.go.
//
// Addresses of the host come and go (hostaddr.go); lineages are told, and move their
// SAs (mobike.go).
//
// The SPD is mirrored here: see mirror and spd. A lineage waits for a mirror that
// is known not to be true, Run never waits for a lineage.
//
// Inboxes are bounded. A datagram that finds its lineage's inbox full is
// dropped and counted: the peer sends it again. The outputs of a lineage are
// carried out in order and to the end, so that an inbound SA is in place before
// the message leaves that lets the peer use it.
package ike
