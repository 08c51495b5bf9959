package ipseckey

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Format writes an SA as an add command. Without secret each digit of a key is
// an X. What the language cannot say is told in the note, which is empty where
// the command, read again, is the SA.
func Format(p *ipsec.SAParams, secret bool) (command, note string) {
	var b strings.Builder
	var notes []string
	fmt.Fprintf(&b, "add %v spi %v src %v dst %v mode %v", p.Proto, p.SPI, p.Src, p.Dst, p.Mode)
	if p.ReqID != 0 {
		fmt.Fprintf(&b, " reqid %d", p.ReqID)
	}
	if p.Encr != alg.EncrNone {
		fmt.Fprintf(&b, " encr_alg %v", p.Encr)
	}
	writeKey(&b, "encrkey", p.EncrKey, secret)
	if p.Auth != alg.IntegNone {
		fmt.Fprintf(&b, " auth_alg %v", p.Auth)
	}
	writeKey(&b, "authkey", p.AuthKey, secret)
	if p.ReplayWindow != 0 {
		fmt.Fprintf(&b, " replay %d", p.ReplayWindow)
	}
	if p.ESN {
		b.WriteString(" esn")
	}
	if p.LastSeq != 0 {
		fmt.Fprintf(&b, " replay_value %d", p.LastSeq)
	}
	if p.AggFrag {
		b.WriteString(" aggfrag")
	}
	writeLimits(&b, "hard_", p.Hard)
	writeLimits(&b, "soft_", p.Soft)
	writeLimits(&b, "idle_", ipsec.Lifetime{AddTime: p.Idle.AddTime, UseTime: p.Idle.UseTime})
	if e := p.Encap; e != nil {
		fmt.Fprintf(&b, " encap udp outbound nat_lport %d nat_rport %d", e.SPort, e.DPort)
		if e.OA.IsValid() {
			fmt.Fprintf(&b, " nat_rem %v", e.OA)
		}
	}
	if len(p.SrcTS) > 0 || len(p.DstTS) > 0 {
		if s, ok := formatTS(p); ok {
			b.WriteString(s)
		} else {
			notes = append(notes, "traffic selectors")
		}
	}
	return b.String(), strings.Join(notes, "; ")
}

func writeKey(b *strings.Builder, name string, k ipsec.Key, secret bool) {
	switch {
	case k.Len() == 0:
	case secret:
		fmt.Fprintf(b, " %s %s", name, hex.EncodeToString(k.Bytes()))
	default:
		fmt.Fprintf(b, " %s %s", name, strings.Repeat("X", 2*k.Len()))
	}
}

func writeLimits(b *strings.Builder, kind string, l ipsec.Lifetime) {
	for _, e := range []struct {
		name string
		n    uint64
	}{
		{"bytes", l.Bytes}, {"packets", l.Packets},
		{"addtime", uint64(l.AddTime / time.Second)}, {"usetime", uint64(l.UseTime / time.Second)},
	} {
		if e.n != 0 {
			fmt.Fprintf(b, " %s%s %d", kind, e.name, e.n)
		}
	}
}

// formatTS writes selectors of one element each, which is what the language has.
func formatTS(p *ipsec.SAParams) (string, bool) {
	if len(p.SrcTS) != 1 || len(p.DstTS) != 1 {
		return "", false
	}
	s, d := p.SrcTS[0], p.DstTS[0]
	sp, ok1 := prefixOf(s)
	dp, ok2 := prefixOf(d)
	sport, ok3 := onePort(s)
	dport, ok4 := onePort(d)
	if !ok1 || !ok2 || !ok3 || !ok4 || s.Proto != d.Proto || s.Proto == 255 {
		return "", false
	}
	if p.Mode == ipsec.Tunnel {
		out := fmt.Sprintf(" isrc %v idst %v", sp, dp)
		for _, e := range []struct {
			name string
			n    uint16
		}{{"iproto", uint16(s.Proto)}, {"isport", sport}, {"idport", dport}} {
			if e.n != 0 {
				out += fmt.Sprintf(" %s %d", e.name, e.n)
			}
		}
		return out, true
	}
	if !sp.IsSingleIP() || !dp.IsSingleIP() || sp.Addr() != p.Src || dp.Addr() != p.Dst || s.Proto == 0 && sport == 0 && dport == 0 {
		return "", false
	}
	var out string
	for _, e := range []struct {
		name string
		n    uint16
	}{{"proto", uint16(s.Proto)}, {"sport", sport}, {"dport", dport}} {
		if e.n != 0 {
			out += fmt.Sprintf(" %s %d", e.name, e.n)
		}
	}
	return out, true
}

// prefixOf is the prefix that a selector's range is, if it is one.
func prefixOf(t ipsec.TrafficSelector) (netip.Prefix, bool) {
	for bits := t.Start.BitLen(); bits >= 0; bits-- {
		p := netip.PrefixFrom(t.Start, bits)
		if p.Masked().Addr() != t.Start {
			break
		}
		if ipsecconf.LastAddr(p) == t.End {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// onePort is a single port, 0 for any.
func onePort(t ipsec.TrafficSelector) (uint16, bool) {
	if t.PortLo == 0 && t.PortHi == 65535 {
		return 0, true
	}
	return t.PortLo, t.PortLo == t.PortHi && t.PortLo != 0
}
