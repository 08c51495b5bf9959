package sa

import (
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// State of the IKE SA that a lineage uses.
type State uint8

// SA is an IKE SA, its child SAs, and what it becomes by rekeying.
type SA struct{}

// NewInitiator makes an SA that will speak first, by rule. Start begins.
func NewInitiator(c Config, rule *pad.Rule) *SA { return &SA{} }

// NewResponder makes an SA for an IKE_SA_INIT request, which is then given to
// Receive. candidates are the rules that cover the addresses, in their order
// (pad.DB.Inbound). If the request is refused, the outputs of Receive hold the
// refusal, if there is one to send, Failed and Done.
func NewResponder(c Config, candidates []*pad.Rule) *SA { return &SA{} }

// Start begins IKE_SA_INIT. The first request becomes the child SA of
// IKE_AUTH, the others follow. Without any the IKE SA is made childless if the
// peer can (RFC 6023), else it fails.
func (s *SA) Start(now time.Time, reqs ...ChildRequest) []Output { return nil }

// Receive takes an IKE message.
func (s *SA) Receive(now time.Time, d Datagram) []Output { return nil }

// AddChild asks for one more child SA, in any state before the end.
func (s *SA) AddChild(now time.Time, r ChildRequest) []Output { return nil }

// ChildSPI answers NeedSPI: an SPI, or the error that prevented one.
func (s *SA) ChildSPI(now time.Time, token uint32, spi ipsec.SPI, err error) []Output { return nil }

// ChildExpired says that an SA of a child SA, of either direction, reached a
// limit: soft rekeys it, hard deletes it.
func (s *SA) ChildExpired(now time.Time, id ipsec.SAID, hard bool) []Output { return nil }

// ChildLost says that an SA was not installed or vanished (flushed, deleted by
// hand): the peer is told by a Delete.
func (s *SA) ChildLost(now time.Time, id ipsec.SAID, err error) []Output { return nil }

// Heard says that a child SA received something: the peer lives.
func (s *SA) Heard(now time.Time) {}

// Rekey rekeys the IKE SA now.
func (s *SA) Rekey(now time.Time) []Output { return nil }

// Delete ends the lineage in order: the peer is told. Failed with ErrClosed
// comes with the peer's answer, or when it does not come.
func (s *SA) Delete(now time.Time) []Output { return nil }

// Drop ends the lineage at once, without telling the peer.
func (s *SA) Drop(now time.Time, reason error) []Output { return nil }

// Tick does what is due at now.
func (s *SA) Tick(now time.Time) []Output { return nil }

// Deadline returns when Tick is wanted; the zero time for never.
func (s *SA) Deadline() time.Time { return time.Time{} }

// Status describes the SA.
func (s *SA) Status() Status { return Status{} }

// Cookie makes the cookie that a responder demands of an IKE_SA_INIT request
// (RFC 7296, 2.6): version, which tells the secrets apart, and a MAC under
// secret over nonce, the peer's address and its SPI. ok is false if init is not
// an IKE_SA_INIT request with a nonce.
func Cookie(secret []byte, version byte, remote netip.AddrPort, init *ikev2.Message) (cookie []byte, ok bool) {
	return nil, false
}

// CheckCookie reports whether init brings back the cookie of secret.
func CheckCookie(secret []byte, version byte, remote netip.AddrPort, init *ikev2.Message) bool {
	return false
}

// CookieResponse makes the response to init that demands cookie.
func CookieResponse(init *ikev2.Message, cookie []byte) ([]byte, error) { return nil, nil }
