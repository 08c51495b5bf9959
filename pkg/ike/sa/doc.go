// Package sa is IKEv2 (RFC 7296) as a machine without I/O: one SA value is an
// IKE SA with its child SAs, and the lineage that it becomes by rekeying, in
// either role, authenticated by pre-shared keys or certificates. It hides message IDs and
// retransmission, protection, key derivation, negotiation, NAT detection,
// liveness, lifetimes and every collision of RFC 7296, 2.25. Only pkg/ike
// calls it.
//
// # Inputs and outputs
//
// Each method of SA is an input: a value and the present time. It returns
// outputs in the order in which they are to be carried out; in particular an
// InstallChild comes before the Send that lets the peer use the SA. Between
// inputs nothing happens: the machine has no goroutine and no timer. Its owner
// calls Tick once Deadline has come. An SA is not safe for concurrent use.
//
//	initiator                            responder
//	NewInitiator                         daemon: cookie, half-open budget
//	Start   -> NewIKESA, Send   ----->   NewResponder, Receive
//	Receive -> NeedSPI          <-----      -> NewIKESA, Send
//	ChildSPI-> Send             ----->   Receive  -> NeedSPI
//	Receive -> Established,     <-----   ChildSPI -> InstallChild, Send,
//	           InstallChild                          Established
//
// NeedSPI asks for the SPI that a child SA will receive on; the exchange stands
// still until ChildSPI answers it (with an error, too). All else goes on.
//
// When the peer rekeys a child SA, the outbound SA comes later than the inbound
// one, by InstallOut, once it is clear that the peer has our answer: it closes the
// old child SA, asks for something else, or does not ask again.
//
// Octets in a Datagram belong to the machine after the call. Octets in outputs
// belong to the receiver, except that those of a Send may be sent again and must
// not be changed. Keys in InstallChild
// and InstallOut are the receiver's to wipe.
//
// # AH, and alternatives
//
// A child SA is a pair of SAs of ESP or of AH. The SA payload of an exchange holds
// the alternatives of the policy in order, those of ESP and those of AH side by
// side under one SPI, and the responder takes the first of its own policy's that
// is among them.
//
// RFC 7296 has no bundles: ESP inside AH is two child SAs with the same selectors,
// each with a life of its own, and it is for the data path to put both on a
// packet. In an offer of several alternatives one of ESP inside AH is represented
// by its ESP; whoever learns from the answer that it is this one asks for its AH
// in an exchange that follows (ChildRequest.Proposals). A responder grants the AH
// of such an alternative when nothing better fits.
//
//	initiator, policy: ESP(a) in AH(b), or ESP(c), or AH(d)
//	HDR, SK {SA(1: ESP a; 2: ESP c; 3: AH d), ...}  -->
//	                               <--  HDR, SK {SA(1: ESP a), ...}
//	HDR, SK {SA(1: AH b), ...}  -->
//	                               <--  HDR, SK {SA(1: AH b), ...}
//
// Behind a NAT, which AH does not pass, alternatives with AH are left out.
//
// # IPComp
//
// Where rule or policy want it, ESP and AH are offered, and granted, with IPComp
// inside (RFC 7296, 2.22). It makes no SA of its own: each of the two SAs has the CPI of
// its receiver (ipsec.SAParams.CPI), a new one with each rekeying.
//
//	HDR, SK {N(IPCOMP_SUPPORTED, CPI i, DEFLATE), SA, ...}  -->
//	     <--  HDR, SK {N(IPCOMP_SUPPORTED, CPI r, DEFLATE), SA, ...}
//
// # Several key exchanges
//
// Where the suite has additional key exchanges (RFC 9370), each of them has an
// exchange of its own: IKE_INTERMEDIATE between IKE_SA_INIT and IKE_AUTH, whose
// messages AUTH covers (RFC 9242), and IKE_FOLLOWUP_KE after CREATE_CHILD_SA, for a
// child SA and for the IKE SA. Messages that are too long for a datagram go in
// fragments (RFC 7383).
//
// # Addresses inside
//
// An initiator whose rule says so asks for addresses by a Configuration payload in
// IKE_AUTH (Configured); a responder whose rule has pools asks its Host for them
// (Leaser). What a peer may have of a policy that leaves the peer open is then cut
// to them, and what we ask for to ours.
//
// # Collisions
//
// Either side may ask for something at any time, and requests cross, are lost and
// come twice. What the peer asks for is answered by what we have under way
// ourselves (RFC 7296, 2.8.1, 2.8.2 and 2.25); "it" is the child SA that ours is
// about, "unknown" is one that we do not have.
//
//	under way       create  rekey   rekey   rekey   close   close   close   rekey   close
//	                child   it      other   unknown it      other   unknown IKE SA  IKE SA
//	nothing         yes     yes     yes     no SA   yes     yes     silent  yes     yes
//	create child    yes     yes     yes     later   yes     yes     silent  later   yes
//	rekey child     yes     both    yes     later   yes     yes     silent  later   yes
//	child replaced  yes     later   yes     no SA   yes     yes     silent  yes     yes
//	close child     yes     later   yes     no SA   silent  yes     silent  later   yes
//	rekey IKE SA    later   later   later   later   yes     yes     silent  both    yes
//	IKE SA replaced later   later   later   later   yes     yes     silent  later   yes
//	close IKE SA    later   later   later   later   yes     yes     silent  later   yes
//
//	yes     as if nothing were under way
//	both    likewise: both replacements are made, and nonces decide
//	silent  what is there goes; no Delete payload in the answer names it
//	no SA   CHILD_SA_NOT_FOUND
//	later   TEMPORARY_FAILURE
//
// An unknown child SA, while one of ours is being made, may be that one; hence
// "later". By the same table the peer judges ours, and so:
//
//	what we asked for  the peer had under way  what becomes of it
//	rekey child        rekey it                both are made. The one that the lowest
//	                                           of the four nonces made is closed by its
//	                                           initiator, the old one by the other side
//	rekey child        rekeyed it, unaware     CHILD_SA_NOT_FOUND: the peer's stays, and
//	                                           the peer closes the old one
//	rekey child        close it                forgotten when its Delete comes
//	rekey child        does not have it        ours goes without a Delete, and a new one
//	                                           is asked for
//	create, rekey      rekey or close IKE SA   again later, in the IKE SA that is then
//	                                           there; ChildFailed if there is none
//	close child        whatever                done
//	rekey IKE SA       rekey IKE SA            as with child SAs, which go to the one
//	                                           that stays
//	rekey IKE SA       create, rekey, close    again later, unless the peer's own comes
//	                   child                   before
//	rekey IKE SA       close IKE SA            forgotten: the lineage ends
//	close IKE SA       whatever                done
//
// Again means after half a second to 20, at random, for three minutes. If
// TEMPORARY_FAILURE is then all that there has been, and something was to be
// rekeyed, the IKE SA ends; a new child SA is only given up. Where an exchange is
// a series (IKE_FOLLOWUP_KE), it is judged at each step, and the nonces are those
// of its CREATE_CHILD_SA.
//
// # Addresses outside
//
// With MOBIKE (RFC 4555) the lineage goes on between other addresses: SetAddresses
// says which ones we have, Moved what becomes of the SAs, and mobike.go who decides
// what. Policies go on naming the addresses of the beginning: their SAs have them as
// Home. Without MOBIKE only a NAT in front of the peer may change its address
// (PeerMoved).
//
// # What kills the machine
//
// Nothing that is not authenticated changes the state of an IKE SA with keys:
// it is counted (Counters) and dropped. Before there are keys, what whoever sees
// our request may have said in the responder's place does not end what was begun
// with it: see init.go.
//
//	kills (Failed, later Done)              leaves it able to go on
//	no answer after all retransmissions     forged, damaged, replayed, late,
//	IKE_SA_INIT or IKE_AUTH refused           unknown or oversized datagrams
//	authentication failed, either side      a child SA refused, either side
//	peer deletes the IKE SA                   (ChildFailed)
//	INVALID_SYNTAX under protection         UNSUPPORTED_CRITICAL_PAYLOAD in a
//	  (RFC 7296, 2.21.3)                      request after IKE_AUTH
//	hard lifetime, Delete, Drop             a rekey refused: the old SA stays
//	a rekey put off for three minutes,
//	  and nothing else granted meanwhile
//
// Failed says that the lineage has no usable IKE SA any more; its children have
// been removed before. It may still have to repeat its last response, so the
// owner goes on calling Receive and Tick until Done, after which it forgets the
// SA. Inputs after Done return nothing.
//
// # What is not here
//
// Sockets, SPI demultiplexing and INVALID_IKE_SPI, INVALID_MAJOR_VERSION and
// cookie policy belong to pkg/ike (the arithmetic of cookies is here: Cookie,
// CookieResponse). Certificates and signatures are pkg/ike/cred's, whose values
// stand in the rule; they compute inside the input, which takes some milliseconds,
// and read nothing. EAP, raw public keys, hash-and-URL, are not implemented: their payloads are ignored, their notifies not sent.
package sa
