// Package keysock is PF_KEYv2 (RFC 2367 and the extensions that Linux and KAME
// share) over an AF_UNIX SOCK_SEQPACKET socket, in our nouns: a typed [Client]
// for the key daemon and loadConfig, a typed [Server] for missiu, which calls a
// [Backend]. Octets, sequence numbers, the algorithm numbers of SADB and the
// rules of who hears what stay inside; proto/pfkey holds the wire format.
//
// # Server
//
// Requests of all connections are handled one at a time, to the end, in the
// goroutine that runs [Server.Serve]; so are functions given to [Server.Do].
// The answer is in the client's queue before the next request is looked at.
//
// Each connection has a reader, a writer and a queue of its own. Events and
// copies of other clients' answers are dropped, and counted, when the queue
// holds ServerOptions.QueueLen of them; a connection that opted in to private
// messages is told so by a [Lost] event as soon as there is room. Answers to a
// client's own requests are never dropped: while too many of them wait, its
// requests are not read. Dumps are paced by their reader, and what they show is
// fetched a little at a time, so that 100,000 SAs hold up nobody. A client that
// leaves an answer unread for ServerOptions.StallLimit is closed; one that
// merely does not read events is not, since programs exist that read only after
// asking.
//
// Connections that asked for it (our own clients) may have several messages in a
// datagram, back to back, at most 64 KiB of requests and 32 KiB of answers: many
// small requests are then mostly system calls and changes of goroutine no more.
// Their requests are handled without those of others in between.
//
// Answers to ADD and UPDATE go to everybody and carry no keys; GET and DUMP do,
// to the asker alone (and to promiscuous sockets, which hear all).
//
// IDENTITY, SENSITIVITY and PROXY are taken and forgotten; X_SEC_CTX is stored
// and given back; X_KMADDRESS is in the announcement of an X_MIGRATE.
//
// # Policy transactions
//
// Between Begin and Commit the policy requests of a connection work on a draft,
// and its ADD, UPDATE and DELETE are checked and put off; nobody else is told of
// them. Commit puts all in force and tells: opted-in connections of policies with
// one [PoliciesChanged] event, everybody of SAs (of the first 4096) by the
// answers. GETSPI, GET, DUMP and FLUSH work on what is in force. The
// connection's end aborts.
package keysock
