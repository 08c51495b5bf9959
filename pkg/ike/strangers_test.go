package ike

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/proto/ikev2"
)

// What a daemon says to messages that anybody can send (RFC 7296, 1.2, 2.5, 2.6, 2.21
// and 3), and whether it keeps something for them.

// first edits a good first message: its payloads, then its octets.
type first struct {
	payloads func(*ikev2.Message)
	octets   func([]byte) []byte
}

func (f first) of(t *testing.T, good []byte) []byte {
	t.Helper()
	b := slices.Clone(good)
	if f.payloads != nil {
		m, err := ikev2.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		f.payloads(m)
		if b, err = m.Append(nil); err != nil {
			t.Fatal(err)
		}
	}
	if f.octets != nil {
		b = f.octets(b)
	}
	return b
}

// at puts a value into one octet.
func at(i int, v byte) first {
	return first{octets: func(b []byte) []byte { b[i] = v; return b }}
}

func payloads(f func(*ikev2.Message)) first { return first{payloads: f} }

// body replaces the octets of the payload of a type, which may then be malformed.
func body(typ ikev2.PayloadType, b []byte) first {
	return payloads(func(m *ikev2.Message) {
		i := slices.IndexFunc(m.Payloads, func(p ikev2.Payload) bool { return p.PayloadType() == typ })
		m.Payloads[i] = &ikev2.Unknown{Type: typ, Body: b}
	})
}

func more(ps ...ikev2.Payload) first {
	return payloads(func(m *ikev2.Message) { m.Payloads = append(m.Payloads, ps...) })
}

// twice repeats the payload of a type, without repeats it.
func twice(typ ikev2.PayloadType, twice bool) first {
	return payloads(func(m *ikev2.Message) {
		i := slices.IndexFunc(m.Payloads, func(p ikev2.Payload) bool { return p.PayloadType() == typ })
		if twice {
			m.Payloads = append(m.Payloads, m.Payloads[i])
		} else {
			m.Payloads = slices.Delete(m.Payloads, i, i+1)
		}
	})
}

// offered edits the proposals.
func offered(f func(*ikev2.SA)) first {
	return payloads(func(m *ikev2.Message) { f(ikev2.Find[*ikev2.SA](m.Payloads)) })
}

// transforms puts ts into the only proposal.
func transforms(ts ...ikev2.Transform) first {
	return offered(func(s *ikev2.SA) {
		s.Proposals = s.Proposals[1:2]
		s.Proposals[0].Number, s.Proposals[0].Transforms = 1, ts
	})
}

func TestStrangers(t *testing.T) {
	const (
		nothing = ikev2.NotifyType(0)
		good    = ikev2.NotifyType(65535) // what none is
	)
	alien := func(critical bool) ikev2.Payload {
		return &ikev2.Unknown{Type: 201, Critical: critical, Body: []byte{1, 2}}
	}
	encr := ikev2.NewTransform(ikev2.TransformENCR, ikev2.EncrAES_GCM_16, 256)
	prf, ke := ikev2.NewTransform(ikev2.TransformPRF, ikev2.PRFHMAC_SHA2_256, 0), ikev2.NewTransform(ikev2.TransformKE, ikev2.KECURVE25519, 0)
	odd := encr
	odd.Attributes = append(slices.Clone(odd.Attributes), ikev2.Attribute{Type: 99, Value: []byte{1, 2, 3}})
	length := func(d int) first {
		return first{octets: func(b []byte) []byte { binary.BigEndian.PutUint32(b[24:], uint32(len(b)+d)); return b }}
	}
	bothSPIs := func(exchange ikev2.ExchangeType) first {
		return payloads(func(m *ikev2.Message) { m.Exchange, m.ResponderSPI, m.MessageID = exchange, 7, 3 })
	}
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, func(c *Config, _ *missiu) { c.Limits.CookieThreshold, c.Limits.HalfOpenPerSource = 1000, 1000 })
		probe := initRequest(t, a, addrB, n)
		from := 0
		put := func(data []byte) (answers [][]byte) {
			t.Helper()
			before := len(n.packets())
			n.send(packet{netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(from)}), 500), netip.AddrPortFrom(addrB, 500), data})
			synctest.Wait()
			for _, p := range n.packets()[before+1:] {
				answers = append(answers, p.data)
			}
			return answers
		}
		for _, tt := range []struct {
			name string
			first
			want ikev2.NotifyType
			data string // of the notify
		}{
			{"as it should be", first{}, good, ""},
			{"minor version 7", at(17, 0x27), good, ""},
			{"reserved flags", at(19, 0xcf), good, ""},
			{"flag: can do a higher version", at(19, 0x18), good, ""},
			{"reserved bits of a payload", at(29, 0x7f), good, ""},
			{"critical bit of a known payload", at(29, 0x80), good, ""},
			{"unknown payload", more(alien(false)), good, ""},
			{"unknown critical payload", more(alien(true)), ikev2.UNSUPPORTED_CRITICAL_PAYLOAD, "\xc9"},
			{"unknown notifies", more(&ikev2.Notify{Type: 40000}, &ikev2.Notify{Type: 8000, Data: []byte{1}}), good, ""},
			{"vendor ID", more(&ikev2.VendorID{Data: []byte("x")}), good, ""},
			{"payloads of other exchanges", more(&ikev2.Delete{Protocol: ikev2.ProtocolIKE}), good, ""},
			{"without NAT detection", payloads(func(m *ikev2.Message) { m.Payloads = m.Payloads[:3] }), good, ""},
			{"major version 3", at(17, 0x30), ikev2.INVALID_MAJOR_VERSION, ""},
			{"major version 15", at(17, 0xf0), ikev2.INVALID_MAJOR_VERSION, ""},
			{"major version 1", at(17, 0x10), nothing, ""},
			{"major version 0", at(17, 0x00), nothing, ""},
			{"major version 3, a response", first{octets: func(b []byte) []byte { b[17], b[19] = 0x30, 0x20; return b }}, nothing, ""},
			{"length too long", length(1), nothing, ""},
			{"length too short", length(-1), nothing, ""},
			{"length 0", length(-len(probe)), nothing, ""},
			{"octets behind the last payload", first{octets: func(b []byte) []byte {
				b = append(b, 0, 0, 0)
				binary.BigEndian.PutUint32(b[24:], uint32(len(b)))
				return b
			}}, nothing, ""},
			{"payload of length 3", at(31, 3), nothing, ""},
			{"initiator's SPI 0", payloads(func(m *ikev2.Message) { m.InitiatorSPI = 0 }), nothing, ""},
			{"responder's SPI", payloads(func(m *ikev2.Message) { m.ResponderSPI = 1 }), nothing, ""},
			{"a response", at(19, 0x28), nothing, ""},
			{"not from the initiator", at(19, 0), nothing, ""},
			{"message ID 1", at(23, 1), nothing, ""},
			{"unknown exchange", at(18, 99), nothing, ""},
			{"unknown exchange of an unknown IKE SA", bothSPIs(99), ikev2.INVALID_IKE_SPI, ""},
			{"known exchange of an unknown IKE SA", bothSPIs(ikev2.CREATE_CHILD_SA), ikev2.INVALID_IKE_SPI, ""},
			{"response of an unknown IKE SA", payloads(func(m *ikev2.Message) {
				m.Exchange, m.ResponderSPI, m.Flags = ikev2.INFORMATIONAL, 7, ikev2.FlagResponse
			}), nothing, ""},
			{"another group", payloads(func(m *ikev2.Message) {
				*ikev2.Find[*ikev2.KE](m.Payloads) = ikev2.KE{Method: ikev2.KEECP256, Data: make([]byte, 64)}
			}), ikev2.INVALID_KE_PAYLOAD, "\x00\x1f"},
			{"group of no proposal", payloads(func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Method = 9999 }), ikev2.INVALID_KE_PAYLOAD, "\x00\x1f"},
			{"key exchange of 31 octets", payloads(func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Data = make([]byte, 31) }), nothing, ""},
			{"key exchange of 0 octets", payloads(func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Data = nil }), nothing, ""},
			{"key exchange of order 1", payloads(func(m *ikev2.Message) { ikev2.Find[*ikev2.KE](m.Payloads).Data = make([]byte, 32) }), nothing, ""},
			{"nonce of 15 octets", body(ikev2.PayloadNonce, make([]byte, 15)), nothing, ""},
			{"nonce of 16 octets", body(ikev2.PayloadNonce, make([]byte, 16)), good, ""},
			{"nonce of 256 octets", body(ikev2.PayloadNonce, make([]byte, 256)), good, ""},
			{"nonce of 257 octets", body(ikev2.PayloadNonce, make([]byte, 257)), nothing, ""},
			{"two nonces", twice(ikev2.PayloadNonce, true), nothing, ""},
			{"two key exchanges", twice(ikev2.PayloadKE, true), nothing, ""},
			{"two offers", twice(ikev2.PayloadSA, true), nothing, ""},
			{"no nonce", twice(ikev2.PayloadNonce, false), nothing, ""},
			{"no key exchange", twice(ikev2.PayloadKE, false), nothing, ""},
			{"no offer", twice(ikev2.PayloadSA, false), nothing, ""},
			{"offer without proposals", body(ikev2.PayloadSA, nil), nothing, ""},
			{"hundred proposals", offered(func(s *ikev2.SA) {
				ok := s.Proposals[1]
				s.Proposals = nil
				for i := range 100 {
					p := ikev2.Proposal{Number: uint8(i + 1), Protocol: ikev2.ProtocolIKE, Transforms: []ikev2.Transform{prf}}
					if i == 99 {
						p.Transforms = ok.Transforms
					}
					s.Proposals = append(s.Proposals, p)
				}
			}), good, ""},
			{"proposals all of number 0", offered(func(s *ikev2.SA) {
				for i := range s.Proposals {
					s.Proposals[i].Number = 0
				}
			}), good, ""},
			{"proposal for ESP", offered(func(s *ikev2.SA) {
				for i := range s.Proposals {
					s.Proposals[i].Protocol = ikev2.ProtocolESP
				}
			}), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"proposal with an SPI", offered(func(s *ikev2.SA) {
				for i := range s.Proposals {
					s.Proposals[i].SPI = make([]byte, 8)
				}
			}), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"one of each transform", transforms(encr, prf, ke), good, ""},
			{"transforms in another order", transforms(ke, encr, prf), good, ""},
			{"unknown attribute", transforms(odd, prf, ke), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"unknown attribute of one of two", transforms(odd, encr, prf, ke), good, ""},
			{"unknown transform type", transforms(encr, prf, ke, ikev2.Transform{Type: 200, ID: 1}), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"no group", transforms(encr, prf), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"no cipher", transforms(prf, ke), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"no transforms", transforms(), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"cipher without the length of its key", transforms(ikev2.Transform{Type: ikev2.TransformENCR, ID: encr.ID}, prf, ke), ikev2.NO_PROPOSAL_CHOSEN, ""},
			{"254 of a transform", transforms(append(slices.Repeat([]ikev2.Transform{encr}, 253), prf, ke)...), good, ""},
			{"an Encrypted payload", more(&ikev2.Encrypted{Body: make([]byte, 40)}), good, ""},
			{"a fragment", payloads(func(m *ikev2.Message) {
				m.Payloads = []ikev2.Payload{&ikev2.EncryptedFragment{Number: 1, Total: 2, Body: make([]byte, 40)}}
			}), nothing, ""},
			{"fragment 3 of 2", more(&ikev2.EncryptedFragment{Number: 3, Total: 2, Body: make([]byte, 40)}), nothing, ""},
		} {
			from++
			before := b.budget.halfOpen()
			request := tt.of(t, probe)
			answers := put(request)
			if len(answers) != min(1, int(tt.want)) {
				t.Errorf("%s: %d answers", tt.name, len(answers))
				continue
			}
			if kept := b.budget.halfOpen() - before; kept != 0 && tt.want != good || kept != 1 && tt.want == good {
				t.Errorf("%s: %d half open", tt.name, kept)
			}
			if tt.want == nothing {
				continue
			}
			m, err := ikev2.Parse(answers[0])
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
				continue
			}
			h := ikev2.Header{InitiatorSPI: m.InitiatorSPI, ResponderSPI: m.ResponderSPI, Exchange: ikev2.ExchangeType(request[18]),
				Flags: ikev2.FlagResponse, MessageID: binary.BigEndian.Uint32(request[20:])}
			if m.Header != h || uint64(m.InitiatorSPI) != binary.BigEndian.Uint64(request) {
				t.Errorf("%s: header %+v", tt.name, m.Header)
			}
			if tt.want != good {
				if o, ok := m.Payloads[0].(*ikev2.Notify); len(m.Payloads) != 1 || !ok || o.Type != tt.want || string(o.Data) != tt.data {
					t.Errorf("%s: answer %v, want %v", tt.name, m.Payloads, tt.want)
				}
				continue
			}
			s := ikev2.Find[*ikev2.SA](m.Payloads)
			if s == nil || len(s.Proposals) != 1 || m.ResponderSPI == 0 || ikev2.Find[*ikev2.KE](m.Payloads) == nil || ikev2.Find[*ikev2.Nonce](m.Payloads) == nil {
				t.Errorf("%s: answer %v", tt.name, m.Payloads)
				continue
			}
			if p := s.Proposals[0]; tt.name == "hundred proposals" && p.Number != 100 || tt.name == "proposals all of number 0" && p.Number != 0 {
				t.Errorf("%s: chosen is number %d", tt.name, p.Number)
			}
			if again := put(request); len(again) != 1 || !slices.Equal(again[0], answers[0]) || b.budget.halfOpen() != before+1 {
				t.Errorf("%s: again: %d answers, %d more half open", tt.name, len(again), b.budget.halfOpen()-before-1)
			}
			time.Sleep(time.Second) // unprotected answers are limited
		}
		a.stop(t)
		b.stop(t)
	})
}

// RFC 7296, 2.6: the cookie is demanded again from whoever brings another one, or not
// in the first place; with it the request is like any other.
func TestStrangersCookies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, a, b := pair(t, func(c *Config, _ *missiu) { c.Limits.AlwaysCookie = true })
		probe := initRequest(t, a, addrB, n)
		from := netip.MustParseAddr("203.0.113.7")
		put := func(port uint16, f first) *ikev2.Message {
			t.Helper()
			before := len(n.packets())
			n.send(packet{netip.AddrPortFrom(from, port), netip.AddrPortFrom(addrB, 500), f.of(t, probe)})
			synctest.Wait()
			ps := n.packets()[before+1:]
			if len(ps) != 1 {
				t.Fatalf("%d answers", len(ps))
			}
			m, err := ikev2.Parse(ps[0].data)
			if err != nil {
				t.Fatal(err)
			}
			return m
		}
		with := func(at int, cookie []byte) first {
			return payloads(func(m *ikev2.Message) {
				m.Payloads = slices.Insert(m.Payloads, at, ikev2.Payload(&ikev2.Notify{Type: ikev2.COOKIE, Data: cookie}))
			})
		}
		asked := func(what string, m *ikev2.Message) []byte {
			t.Helper()
			c := ikev2.FindNotify(m.Payloads, ikev2.COOKIE)
			if len(m.Payloads) != 1 || c == nil || len(c.Data) < 1 || len(c.Data) > 64 || m.ResponderSPI != 0 || m.MessageID != 0 || b.budget.halfOpen() != 0 {
				t.Fatalf("%s: %v, %v", what, m.Header, fmt.Sprint(m.Payloads))
			}
			return c.Data
		}
		cookie := asked("none", put(500, first{}))
		if len(asked("none, minor version 3", put(500, at(17, 0x23)))) == 0 {
			t.Error("no cookie")
		}
		wrong := slices.Clone(cookie)
		wrong[len(wrong)-1] ^= 1
		asked("wrong", put(500, with(0, wrong)))
		asked("short", put(500, with(0, cookie[:len(cookie)-1])))
		asked("empty", put(500, with(0, nil)))
		asked("not the first payload", put(500, with(1, cookie)))
		nonce := with(0, cookie)
		set := nonce.payloads
		nonce.payloads = func(m *ikev2.Message) { set(m); ikev2.Find[*ikev2.Nonce](m.Payloads).Data = make([]byte, 32) }
		asked("of another nonce", put(500, nonce))
		from = netip.MustParseAddr("203.0.113.8")
		asked("of another address", put(500, with(0, cookie)))
		from = netip.MustParseAddr("203.0.113.7")
		if m := put(501, with(0, cookie)); ikev2.Find[*ikev2.SA](m.Payloads) == nil || b.budget.halfOpen() != 1 {
			t.Errorf("with the cookie: %v", m.Payloads)
		}
		a.stop(t)
		b.stop(t)
	})
}
