package pad

import (
	"net/netip"
	"slices"
)

// Pool is addresses for peers, and what else they are told by a Configuration
// payload (RFC 7296, 2.19, 3.15; Domains: RFC 8598). It does not change.
type Pool struct {
	Name    string
	Addrs   []Range // that may be leased
	DNS     []netip.Addr
	Domains []string
	Subnets []netip.Prefix
}

// Contains reports whether a is one of the addresses.
func (p *Pool) Contains(a netip.Addr) bool { return contains(p.Addrs, a) }

// Has reports whether there are addresses of a family: 32 or 128 bits.
func (p *Pool) Has(bits int) bool {
	return slices.ContainsFunc(p.Addrs, func(r Range) bool { return r.From.BitLen() == bits })
}

// Request is what an initiator asks its peer for: addresses of the families, the
// one if it is valid, and name servers.
type Request struct {
	V4, V6 bool
	Addr   netip.Addr
	DNS    bool
}

// Any reports whether an address is asked for.
func (r Request) Any() bool { return r.V4 || r.V6 }
