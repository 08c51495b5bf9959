package pad

import (
	"net/netip"
	"strings"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/dn"
	"github.com/missiu/missiu/proto/ikev2"
)

// ID is an identity, comparable. Data are its octets on the wire: 4 or 16 for
// addresses, text for FQDN and RFC822, DER for a DN, anything for a KEY_ID.
type ID struct {
	Type ikev2.IDType
	Data string
}

// AddrID makes the identity of an address.
func AddrID(a netip.Addr) ID {
	if a.Is4() {
		return ID{ikev2.IDIPv4Addr, string(a.AsSlice())}
	}
	return ID{ikev2.IDIPv6Addr, string(a.AsSlice())}
}

// FromWire takes an identity out of a payload.
func FromWire(id ikev2.ID) ID { return ID{id.Type, string(id.Data)} }

// Wire gives the identity for a payload.
func (id ID) Wire() ikev2.ID { return ikev2.ID{Type: id.Type, Data: []byte(id.Data)} }

// IsZero reports whether id is no identity.
func (id ID) IsZero() bool { return id == ID{} }

// IsAddr reports whether id is an address.
func (id ID) IsAddr() bool { return id.addr().IsValid() }

func (id ID) addr() netip.Addr {
	if id.Type != ikev2.IDIPv4Addr && id.Type != ikev2.IDIPv6Addr {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice([]byte(id.Data))
	return a
}

// String writes a distinguished name as ike.conf does.
func (id ID) String() string { return cred.IDString(id.Wire()) }

// Pattern matches identities. The zero Pattern matches every one.
//
//	Type 0                              every identity
//	addresses From to To                an address between them
//	FQDN "*.example.com"                names with at least one label in front
//	RFC822 "*@example.com"              mailboxes of that domain
//	DN                                  names that it matches (dn.Name.Match)
//	else                                that identity; FQDN and RFC822 ignore case,
//	                                    DNs compare by their parts
//
// Not makes it an exclusion.
type Pattern struct {
	Not      bool
	ID       ID
	From, To netip.Addr // for ID.Type IPv4 or IPv6 with empty Data
	DN       *dn.Name   // for ID.Type DN with empty Data
}

// AnyID is the pattern of every identity.
var AnyID = Pattern{}

// DNPattern matches the distinguished names that n describes.
func DNPattern(n dn.Name) Pattern { return Pattern{ID: ID{Type: ikev2.IDDERASN1DN}, DN: &n} }

// AddrPattern matches the addresses of a range.
func AddrPattern(r Range) Pattern {
	return Pattern{ID: ID{Type: AddrID(r.From).Type}, From: r.From, To: r.To}
}

func (p Pattern) String() string {
	var s string
	if p.Not {
		s = "!"
	}
	switch {
	case p.ID.Type == 0:
		return s + "ANY"
	case p.From.IsValid():
		return s + Range{p.From, p.To}.String()
	case p.DN != nil:
		return s + p.DN.String()
	}
	return s + p.ID.String()
}

// Match reports whether id is what p describes, Not set aside.
func (p Pattern) Match(id ID) bool {
	switch {
	case p.ID.Type == 0:
		return true
	case p.From.IsValid():
		a := id.addr()
		return a.IsValid() && Range{p.From, p.To}.Contains(a)
	case p.ID.Type != id.Type:
		return false
	}
	want, got := p.ID.Data, id.Data
	switch id.Type {
	case ikev2.IDFQDN:
		want, got = strings.ToLower(want), strings.ToLower(got)
		if suffix, ok := strings.CutPrefix(want, "*."); ok {
			return strings.HasSuffix(got, "."+suffix) && len(got) > len(suffix)+1
		}
	case ikev2.IDRFC822Addr:
		want, got = strings.ToLower(want), strings.ToLower(got)
		if domain, ok := strings.CutPrefix(want, "*@"); ok {
			i := strings.LastIndexByte(got, '@')
			return i > 0 && got[i+1:] == domain
		}
	case ikev2.IDDERASN1DN:
		name, err := dn.Parse([]byte(got))
		if p.DN != nil {
			return err == nil && p.DN.Match(name)
		}
		if own, err2 := dn.Parse([]byte(want)); err == nil && err2 == nil {
			return own.Equal(name)
		}
	}
	return want == got
}

// Exact returns the only identity that p matches, if there is only one. A
// distinguished name that is given as text may be encoded in several ways.
func (p Pattern) Exact() (ID, bool) {
	switch {
	case p.Not || p.ID.Type == 0 || p.DN != nil:
		return ID{}, false
	case p.From.IsValid():
		return AddrID(p.From), p.From == p.To
	case p.ID.Type == ikev2.IDFQDN && strings.HasPrefix(p.ID.Data, "*."),
		p.ID.Type == ikev2.IDRFC822Addr && strings.HasPrefix(p.ID.Data, "*@"):
		return ID{}, false
	}
	return p.ID, true
}

// Patterns is a list of patterns and exclusions. A list of exclusions alone
// starts from every identity.
type Patterns []Pattern

// Match reports whether id matches a pattern and no exclusion.
func (ps Patterns) Match(id ID) bool {
	matched, positive := false, false
	for _, p := range ps {
		switch {
		case p.Not && p.Match(id):
			return false
		case !p.Not:
			positive = true
			matched = matched || p.Match(id)
		}
	}
	return matched || !positive
}
