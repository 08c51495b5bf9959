package sa

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"

	"github.com/missiu/missiu/proto/ikev2"
)

// Cookie makes the cookie that a responder without state demands of an
// IKE_SA_INIT request (RFC 7296, 2.6): version, which tells the daemon's
// changing secrets apart, and a MAC under secret over nonce, the peer's address
// and its SPI; 17 octets. ok is false if init is not an IKE_SA_INIT request with
// a nonce.
func Cookie(secret []byte, version byte, remote netip.AddrPort, init *ikev2.Message) (cookie []byte, ok bool) {
	n := ikev2.Find[*ikev2.Nonce](init.Payloads)
	if init.Exchange != ikev2.IKE_SA_INIT || init.IsResponse() || n == nil {
		return nil, false
	}
	// The port stays out: a NAT may change it between two requests.
	m := hmac.New(sha256.New, secret)
	m.Write(binary.BigEndian.AppendUint64([]byte{version}, uint64(init.InitiatorSPI)))
	a := remote.Addr().As16()
	m.Write(a[:])
	m.Write(n.Data)
	return append([]byte{version}, m.Sum(nil)[:16]...), true
}

// CheckCookie reports whether init brings back the cookie of secret. It must
// stand first (RFC 7296, 2.6).
func CheckCookie(secret []byte, version byte, remote netip.AddrPort, init *ikev2.Message) bool {
	if len(init.Payloads) == 0 {
		return false
	}
	n, ok := init.Payloads[0].(*ikev2.Notify)
	if !ok || n.Type != ikev2.COOKIE {
		return false
	}
	want, ok := Cookie(secret, version, remote, init)
	return ok && hmac.Equal(want, n.Data)
}

// CookieResponse makes the response to init that demands cookie.
func CookieResponse(init *ikev2.Message, cookie []byte) ([]byte, error) {
	m := &ikev2.Message{Header: init.Header, Payloads: []ikev2.Payload{&ikev2.Notify{Type: ikev2.COOKIE, Data: cookie}}}
	m.Flags, m.Minor = ikev2.FlagResponse, 0
	return m.Append(nil)
}

// The initiator's side. Nothing tells which of two requests, with and without a cookie,
// an answer is to; our AUTH covers the one, and a proof that does not fit ends what
// the answer began. A cookie may be somebody's who sees the request, and an answer to
// the request as it was on its way. The peer, if it does demand a cookie, repeats it
// with each request that lacks it. So
//
//   - the first cookie is brought back at once: mostly there is nobody else, and
//     what comes next is the answer to that. A peer that had demanded nothing answers
//     twice, the first time in vain; or once, and therefore is sent the request without
//     the cookie again when the proof has failed.
//   - others have their turn one by one, what was repeated first, after moments
//     without an answer that become longer. Whoever demands many gets no more turns in
//     a row than maxCookies; beyond, a turn takes the place of a repetition.

const (
	maxCookies = 5  // that are brought back between two repetitions
	maxHeard   = 16 // that wait for their turn
)

// ignores reports whether there is nothing to do about a demand for a cookie: it is
// none, in the request already, or known.
func (h *handshake) ignores(c []byte) bool {
	same := func(o []byte) bool { return bytes.Equal(o, c) }
	at := slices.IndexFunc(h.heard, same)
	if at >= 0 {
		h.heard = slices.Insert(slices.Delete(h.heard, at, at+1), 0, c)
	}
	return at >= 0 || len(c) == 0 || len(c) > 64 || same(h.cookie) || h.nothing != nil && same(h.spent)
}

// hearCookie deals with a demand for a cookie that is not to be ignored.
func (s *SA) hearCookie(i *ikeSA, c []byte) {
	h := i.hs
	switch {
	case h.cookies == 0 && h.nothing == nil:
		h.cookie = c
		h.cookies++
		s.sendInit(i)
		return
	case len(h.heard) < maxHeard:
		h.heard = append(h.heard, c)
	default: // at random, since the peer's is among them in the end
		h.heard[s.jitter(maxHeard)] = c
	}
	s.awaitTurn(i)
}

// awaitTurn sets the moment after which the next cookie has its turn.
func (s *SA) awaitTurn(i *ikeSA) {
	if h := i.hs; len(h.heard) > 0 && h.cookies < maxCookies {
		s.hasten(i, s.rule.Retransmit.Init/4<<min(h.cookies/2, 2))
	}
}

// nextCookie brings one back that has waited.
func (s *SA) nextCookie(i *ikeSA) {
	h, r := i.hs, i.req
	h.cookie, h.heard = h.heard[0], h.heard[1:]
	h.cookies++
	s.sendInit(i)
	if h.cookies > maxCookies && !s.failed {
		n := i.req
		n.sent, n.wait = r.sent+1, min(max(2*r.wait, s.rule.Retransmit.Init), s.rule.Retransmit.Max)
		n.due = s.now.Add(n.wait)
	}
	s.awaitTurn(i)
}

// withoutCookie sends the request without its cookie, since the proof that covered it
// has failed because of why; false if there was none. If the peer does want it, and
// so has refused that very proof, there is no other answer, and that is the end.
func (s *SA) withoutCookie(i *ikeSA, why error) bool {
	h := i.hs
	if !h.mayDoWithout(why) {
		return false
	}
	h.spent, h.cookie = h.cookie, nil
	s.sendInit(i)
	h.nothing = why
	return true
}

func (h *handshake) mayDoWithout(why error) bool {
	return h.cookie != nil && !errors.Is(why, ErrTimeout)
}
