package sa

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"

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
