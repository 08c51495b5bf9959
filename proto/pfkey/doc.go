// Package pfkey is the wire format of PF_KEYv2: RFC 2367 and the extensions
// that Linux and KAME share, with Linux's layouts where the two differ. It
// decodes, checks form and encodes; what a message means, which extensions it
// needs and who hears it is for pkg/keysock, its only caller.
//
// A message is a datagram: a header of 16 octets, then extensions, all in host
// byte order except SPIs of the SA extension, NAT-T ports and what is inside a
// sockaddr. Lengths are in 64-bit words, of requests inside X_POLICY in octets,
// of keys in bits. Linux's sockaddrs have no length octet.
//
//	 0       1       2       3       4       5       6       7
//	+-------+-------+-------+-------+-------+-------+-------+-------+
//	|version| type  | errno |satype |  len (words)  |   reserved    |
//	+-------+-------+-------+-------+-------+-------+-------+-------+
//	|             seq               |              pid              |
//	+-------+-------+-------+-------+-------+-------+-------+-------+
//	|  len (words)  |  ext type     |  ...
//	+-------+-------+-------+-------+
//
// # Differences from Linux
//
// All that programs can see; test/e2e asks both and compares.
//
//   - HMAC-SHA2-256 (5) has 128 bits of ICV (RFC 4868), not 96.
//   - The AEAD numbers 18-20 are for use; ChaCha20-Poly1305 has the private
//     number 28 (its IKEv2 transform), a key of 256 bits and 32 bits of salt.
//     So are AES-CCM (14-16, 24 bits of salt at the key's end), AES-CTR (13, 32
//     bits of nonce) and NULL with AES-GMAC (23, 32 bits of salt). GMAC of AH has
//     FreeBSD's authentication numbers 11-13, a key of 128, 192 or 256 bits and 32
//     of salt.
//   - DES (2), 3DES (3) and HMAC-MD5 (2) are ENOSYS unless the operator allows
//     legacy algorithms, and in an UPDATE after GETSPI, that is negotiated, even
//     then; and so are those with the headers of RFC 1826 and 1827:
//     keyed MD5 of RFC 1828 (authentication 249, KAME's), RFC 1829 with an IV of
//     64 bits (encryption 1) or 32 (9), both of RFC 2407, and RFC 1851 likewise
//     (240 and 241, ours) with a key of 128 or 192 bits. The number alone says
//     that the header is the old one, since KAME's flag for it is the PFS flag of
//     RFC 2367. Weak and semi-weak keys of DES are EINVAL; parity bits do not matter.
//   - A reqid in a policy is kept at every level; at level unique 0 is replaced
//     by a fresh one from 0x4000 up and told in the answer.
//   - Answers to ADD, UPDATE and DELETE carry no keys (RFC 2367, 3.1.2, 3.1.3),
//     and that to UPDATE says the state that the SA is in; Linux says dead.
//   - UPDATE of a mature SA with another key, algorithm or mode is refused with
//     EINVAL (RFC 2367, 3.1.3); Linux keeps the old ones and says otherwise.
//   - GETSPI without a free SPI is refused with EEXIST (RFC 2367, 3.1.1), and
//     leaves no SA of SPI 0 behind.
//   - What an ACQUIRE asked for is no SA yet: DUMP does not show it, where Linux
//     shows a larval SA of SPI 0.
//   - The first REGISTER of a socket is followed by the ACQUIREs that nobody has
//     answered yet, so that a key daemon does what one before it has left.
//   - EINVAL for what Linux takes: SPIs up to 255, mode BEET, the UDP encapsulation
//     of the draft before RFC 3948, IPv4-mapped addresses, a policy of type IPsec
//     without a request. SA type 0 is EINVAL in all requests about one SA.
//   - EINVAL too for AH with an encryption algorithm, ESP in UDP without ports,
//     and ESP without integrity unless the operator allows it. An id that no
//     policy has is ENOENT, whatever its low bits are.
//   - X_NAT_T_OA is given back. An IPComp SA has replay window 0. X_KMADDRESS is
//     read, and refused if malformed, in messages that do not use it.
//   - ACQUIRE has X_SA2.
//   - Replay windows up to 255 in the SA extension, SA flags that are not carried
//     out are not given back, GET shows NULL's key of no bits, and no PROXY.
//   - FlagXESN (FreeBSD's number) says extended sequence numbers.
//   - ICMP type and code 0 in the ports of a policy's addresses stand as 256,
//     since 0 is any.
//   - X_SEC_CTX is stored with SAs and policies and given back; it is no part of
//     what tells two policies apart.
//   - X_MIGRATE moves every SA between the old end points, where Linux moves one.
//   - LIFETIME_CURRENT.allocations of a policy are the packets that it decided
//     about, up to 32 bits; Linux counts none there and shows 0.
//   - PROPOSAL in SPDADD and SPDUPDATE and their answers holds the alternatives
//     of algorithms of a policy, best first; an authentication or encryption
//     algorithm of 0 accepts any.
//
// # Private messages and extensions
//
// They go only to sockets that sent X_OPT_IN in a REGISTER, since strangers
// refuse a whole message for one type above 26. Requests may use them at once.
//
//	X_BEGIN   224  <base>  opens a transaction of policies and SAs of this connection
//	X_COMMIT  225  <base>  puts it in force; the answer's copy to others says
//	                       that the SPD changed
//	X_ABORT   226  <base>  forgets it, as does the connection's end
//	X_STATUS  227  <base>; answers <base, blob> until offset+n == total: a JSON
//	                       document about the engine
//	X_SPDEXPIRE 21 engine to client, as the answer to X_SPDGET: the life of a
//	                       policy has ended, and it is gone; Linux has the number
//	                       and never sends it
//	X_LOST    228  engine to client <base, count>: so many messages for this
//	                       socket were dropped here
//	X_ADDRADD 229  <base, address(S)>  gives the engine's device, the TAP or TUN,
//	                       an address, as a peer has assigned one (RFC 7296,
//	                       2.19); one that it has is no error. It may get a TUN
//	                       of its own (missiu --vips own)
//	X_ADDRDELETE 230  <base, address(S)>  takes it away; ENOENT
//
// Extensions, offsets from their start; what is not named is zero:
//
//	X_OPT_IN  0x8001  8 octets; 4: features (4): 1 private messages, 2 several
//	                  messages may share a datagram, back to back, in both
//	                  directions; the answer has those that are granted
//	X_SA_MORE 0x8002 40 octets; 4: flags (4: 1 ESN, 2 AGGFRAG_PAYLOAD, RFC
//	                  9347; the high 16 bits are the octets that packets are
//	                  padded to, 65535 the path MTU; RFC 4303, 2.7), 8: replay window in packets (4, counts instead of
//	                  SA.replay), 12: seq of the ACQUIRE (4), 16: packets so
//	                  far, 24: hard, 32: soft limit of packets (8 each, count
//	                  instead of allocations)
//	X_TS_SRC  0x8003  traffic selectors of an SA (RFC 7296, 3.13.1) in its
//	X_TS_DST  0x8004  direction; 4: number (2), then 40 octets each: protocol
//	                  (1), 4 or 6 (1), at 4 low port (2), high port (2), at 8
//	                  first address (16), last address (16), IPv4 in front
//	X_FLOW    0x8005 48 octets; the packet that raised an ACQUIRE; 4: protocol
//	                  (1), 4 or 6 (1), 8: source, destination port (2 each), 16:
//	                  source, destination address (16 each)
//	X_SA_DST  0x8006  as ADDRESS; destination of the SA in X_NAT_T_NEW_MAPPING; in
//	                  UPDATE the one at which a mature SA is, that is to have the
//	                  addresses and ports of the message, its UDP encapsulation
//	                  or none, and its X_HOME_SRC and X_HOME_DST or none: one SA
//	                  moves, where X_MIGRATE moves a policy with all of its SAs
//	X_BLOB    0x8007  4: total (4), 8: offset (4), 12: n (4), 16: n octets
//	X_COUNT   0x8008 16 octets; 8: number (8)
//	X_POLICY_MORE 0x8009 16 octets; 4: flags (4: 1 clear packets are welcome,
//	                  2 an SA pair for every flow, 4 manual SAs without reqid
//	                  serve, 8 SAs are wanted at once), 8: packets that the
//	                  policy decided about (8, count instead of allocations)
//	X_SHAPES  0x800a  what the combinations of PROPOSAL consist of, one for one;
//	                  without it each is ESP alone; 4: number (2), then 8 octets
//	                  each: shape (1: 0 ESP, 1 AH, 2 ESP inside AH), integrity
//	                  algorithm of AH (1, an SADB_AALG, 0 any). auth and encrypt
//	                  of the combination are ESP's, and zero without ESP
//	X_SA_SEQ  0x800b  as X_COUNT; the last sequence number that counts as used,
//	                  of SAs that are shown the one that is
//	X_LIFETIME_IDLE 0x800c  as LIFETIME; an SA that was not used for addtime
//	                  since it was made, or for usetime since its last use, is
//	                  dying until it is used again; EXPIRE says so as of
//	                  LIFETIME_SOFT
//	X_QUEUE   0x800d  8 octets; a queue of the TAP; 4: number (2), from 1, 0 is
//	                  any: of an SA the one whose packets it carries outbound,
//	                  or whose worker it is for inbound, in GETSPI for its SPI,
//	                  in ACQUIRE the one that lacks an SA of its own; in an
//	                  answer to REGISTER how many queues there are; 6: flags
//	                  (2: 1 an outbound SA for any queue, beside which the peer
//	                  takes others for single ones, RFC 9611)
//	X_HOME_SRC 0x800e as ADDRESS; of an SA in tunnel mode, the end points by
//	X_HOME_DST 0x800f which policy knows it, where they are not its addresses
//	                  any more, since it or what it succeeds has moved (RFC
//	                  4555): policies go on naming them. One without the other
//	                  is EINVAL
//	X_SA_CPI  0x8010  as X_COUNT; of an SA of ESP or AH: payloads are compressed by
//	                  DEFLATE before they are protected, behind an IPComp header
//	                  with this CPI (RFC 3173), where that makes them shorter
package pfkey
