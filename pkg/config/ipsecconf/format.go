package ipsecconf

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Format writes a policy as an entry of the language. What the language cannot
// say is told in the note, which is empty where the entry, parsed again, is the
// policy: a forward policy is shown as an inbound one, for instance.
func Format(p *ipsec.Policy) (entry, note string) { return FormatNumeric(p, false) }

// FormatNumeric is Format, if numeric without the names of protocols.
func FormatNumeric(p *ipsec.Policy, numeric bool) (entry, note string) {
	var b strings.Builder
	var notes []string
	dir := p.Dir
	if dir == ipsec.Fwd {
		dir, notes = ipsec.In, append(notes, "forwarded packets")
	}
	if p.Sel.Src != p.Sel.Src.Masked() || p.Sel.Dst != p.Sel.Dst.Masked() {
		notes = append(notes, "bits behind a prefix")
	}
	local, remote, lport, rport := p.Sel.Src, p.Sel.Dst, p.Sel.SrcPort, p.Sel.DstPort
	if dir == ipsec.In && !isICMP(p.Sel.Proto) {
		lport, rport = rport, lport
	}
	if dir == ipsec.In {
		local, remote = remote, local
	}
	// One address has to stay where both are any, or the entry is of both families.
	b.WriteString("{")
	if local.Bits() != 0 {
		fmt.Fprintf(&b, " laddr %s", prefix(local))
	}
	if remote.Bits() != 0 || local.Bits() == 0 {
		fmt.Fprintf(&b, " raddr %s", prefix(remote))
	}
	if p.Sel.Proto != 0 {
		if ulp := protocolName(p.Sel.Proto); numeric {
			fmt.Fprintf(&b, " ulp %d", p.Sel.Proto)
		} else {
			fmt.Fprintf(&b, " ulp %s", ulp)
		}
	}
	switch {
	case isICMP(p.Sel.Proto):
		switch {
		case lport != 0:
			fmt.Fprintf(&b, " type %d", lport-1)
		case rport != 0:
			fmt.Fprintf(&b, " type 0-255")
		}
		if rport != 0 {
			fmt.Fprintf(&b, " code %d", rport-1)
		}
	default:
		if lport != 0 {
			fmt.Fprintf(&b, " lport %d", lport)
		}
		if rport != 0 {
			fmt.Fprintf(&b, " rport %d", rport)
		}
	}
	fmt.Fprintf(&b, " dir %v } ", dir)
	switch p.Action {
	case ipsec.Bypass:
		b.WriteString("bypass {}")
	case ipsec.Discard:
		b.WriteString("drop {}")
	case ipsec.Protect:
		alts := p.Proposals
		if len(alts) == 0 {
			alts = []ipsec.Proposal{{Shape: shapeOf(p)}}
		}
		ends, n := formatRequests(p, alts, dir)
		notes = append(notes, n...)
		switch p.Flags & (ipsec.PolicyPerFlow | ipsec.PolicyInit) {
		case ipsec.PolicyPerFlow:
			ends += " sa unique"
		case ipsec.PolicyInit:
			ends += " sa init"
		case ipsec.PolicyPerFlow | ipsec.PolicyInit:
			ends, notes = ends+" sa unique", append(notes, "sa init")
		}
		if len(p.Proposals) == 0 {
			notes = append(notes, "algorithms left to the key daemon")
		}
		for i := range alts {
			if i > 0 {
				b.WriteString(" or ")
			}
			b.WriteString("ipsec { " + formatProposal(&alts[i]) + ends + " }")
		}
		if p.Flags&ipsec.PolicyClear != 0 {
			b.WriteString(" or pass {}")
		}
	default:
		fmt.Fprintf(&b, "drop {}")
		notes = append(notes, p.Action.String())
	}
	if !p.Hard.IsZero() {
		notes = append(notes, fmt.Sprintf("policy expires: %v", p.Hard.AddTime))
	}
	return b.String(), strings.Join(notes, "; ")
}

func prefix(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func protocolName(n uint8) string {
	for _, name := range []string{"icmp", "tcp", "udp", "ipv6-icmp"} {
		if protocols[name] == n {
			return name
		}
	}
	return fmt.Sprint(n)
}

// shapeOf is what the requests of a policy without alternatives ask for.
func shapeOf(p *ipsec.Policy) ipsec.Shape {
	has := func(proto ipsec.Protocol) bool {
		return slices.ContainsFunc(p.Requests, func(r ipsec.Request) bool { return r.Proto == proto })
	}
	switch {
	case !has(ipsec.AH):
		return ipsec.ShapeESP
	case !has(ipsec.ESP):
		return ipsec.ShapeAH
	}
	return ipsec.ShapeAHESP
}

// formatRequests writes the tunnel end points, and tells what of the requests is
// not what the language makes of the alternatives: ESP and AH in this order, in
// one mode.
func formatRequests(p *ipsec.Policy, alts []ipsec.Proposal, dir ipsec.Direction) (ends string, notes []string) {
	var made []ipsec.Protocol
	for _, proto := range []ipsec.Protocol{ipsec.ESP, ipsec.AH} {
		if len(ipsec.Parts(alts, proto)) > 0 {
			made = append(made, proto)
		}
	}
	for i, r := range p.Requests {
		if f := p.Requests[0]; i >= len(made) || r.Proto != made[i] || r.Mode != f.Mode || r.Src != f.Src || r.Dst != f.Dst {
			notes = append(notes, fmt.Sprintf("%v %v", r.Proto, r.Mode))
			continue
		}
		if r.Mode == ipsec.Tunnel {
			l, e := r.Src, r.Dst
			if dir == ipsec.In {
				l, e = e, l
			}
			ends = fmt.Sprintf(" tladdr %s traddr %s", tunnelEnd(l), tunnelEnd(e))
		}
		switch r.Level {
		case ipsec.LevelUnique:
		case ipsec.LevelUse:
			notes = append(notes, "clear text while there is no SA")
		default:
			notes = append(notes, "SAs shared with other policies")
		}
	}
	return ends, notes
}

func tunnelEnd(a netip.Addr) string {
	if ipsec.Open(a) {
		return "any"
	}
	return a.String()
}

func formatProposal(p *ipsec.Proposal) string {
	var words []string
	if p.Shape.Has(ipsec.AH) {
		name := "any"
		if p.AH != alg.IntegNone {
			name = strings.TrimPrefix(p.AH.String(), "hmac-")
		}
		words = append(words, "auth_algs "+name)
	}
	if p.Shape.Has(ipsec.ESP) {
		w := algWord{min: p.EncrMinBits, max: p.EncrMaxBits}
		name := w.write(p.Encr.String())
		switch p.Encr {
		case alg.EncrNone:
			name = w.write("any")
		case alg.EncrNULL:
			name = "null"
		}
		words = append(words, "encr_algs "+name)
		if p.Auth != alg.IntegNone {
			words = append(words, "encr_auth_algs "+strings.TrimPrefix(p.Auth.String(), "hmac-"))
		}
	}
	s := strings.Join(words, " ")
	if n := p.Hard.AddTime; n != 0 {
		s += fmt.Sprintf(" lifetime_secs %d", n/time.Second)
	}
	if n := p.Hard.Bytes; n != 0 {
		s += fmt.Sprintf(" lifetime_bytes %d", n)
	}
	return s
}
