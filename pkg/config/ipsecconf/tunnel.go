package ipsecconf

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
)

// Tunnel is what counts of a tunnel interface: its end points and the protocols
// of what it makes.
type Tunnel struct {
	Local, Remote netip.Addr
	Protos        []uint8
}

// tunnelEnds are those of an interface named by "tunnel".
type tunnelEnds struct {
	Tunnel
	transport bool // "negotiate transport": what the interface makes is protected
	first     *Entry
}

// tunnel reads "tunnel NAME negotiate tunnel|transport", which Solaris has
// instead of end points: those of the interface count, as it is when the text
// is loaded.
func (m *entryMeaning) tunnel() {
	name, hasName := m.sel["tunnel"]
	how, hasHow := m.sel["negotiate"]
	switch {
	case !hasName && !hasHow:
		return
	case !hasHow:
		m.missing(name.Key, "tunnel: negotiate missing")
		return
	case !hasName:
		m.missing(how.Key, "negotiate: tunnel missing")
		return
	case how.Value.Text != "tunnel" && how.Value.Text != "transport":
		m.badValue(how, "want tunnel or transport")
		return
	}
	t, known := m.tunnels[name.Value.Text]
	if !known {
		t = &tunnelEnds{transport: how.Value.Text == "transport", first: m.e}
		err := errors.New("interfaces are not looked up")
		if m.opt.LookupTunnel != nil {
			t.Tunnel, err = m.opt.LookupTunnel(name.Value.Text)
		}
		if err != nil {
			m.badValue(name, "%v", err)
			return
		}
		m.tunnels[name.Value.Text] = t
		m.tunnelOrder = append(m.tunnelOrder, t)
	}
	if t.transport != (how.Value.Text == "transport") {
		m.badValue(how, "the entry at %v negotiates the other; a tunnel has one of the two", t.first.Pos)
		return
	}
	if t.transport {
		for key, p := range m.sel {
			if key != "tunnel" && key != "negotiate" && key != "dir" {
				m.errorf(p.Key, "%s: not with negotiate transport, which is about all that the interface sends", p.Key.Text)
			}
		}
	}
	m.tun = t
}

// tunnelTransforms gives the end points to what the alternatives ask for.
func (m *entryMeaning) tunnelTransforms(alts []params, ts []transform) {
	if m.tun == nil {
		return
	}
	for k, a := range alts {
		if w := m.e.Alternatives[k].Action; w.Text == "bypass" || w.Text == "pass" {
			// It would pass outside of the tunnel, not inside.
			m.errorf(w, "%s: not with tunnel; want ipsec or drop", w.Text)
		}
		for _, key := range []string{"tladdr", "traddr", "tsrc", "tdst"} {
			if p, ok := a[key]; ok {
				m.errorf(p.Key, "%s: not with tunnel, which has end points", key)
			}
		}
	}
	for i := range ts {
		ts[i].flags &^= ipsec.PolicyPerFlow // of a tunnel one SA pair for an entry; of IP in IP there is one flow
		if m.tun.transport {
			continue
		}
		ts[i].local, ts[i].remote = m.tun.Local, m.tun.Remote
		if d := m.dirs; m.old != nil && len(d) > 0 && (d[0] == ipsec.In || d[0] == dirInMirrored) {
			ts[i].local, ts[i].remote = m.tun.Remote, m.tun.Local
		}
	}
}

// selectors of what the interface makes: IPv4 and IPv6 in IP, or GRE, between
// the end points.
func (t *Tunnel) selectors() []ipsec.Selector {
	var l []ipsec.Selector
	for _, proto := range t.Protos {
		l = append(l, ipsec.Selector{
			Src: netip.PrefixFrom(t.Local, t.Local.BitLen()), Dst: netip.PrefixFrom(t.Remote, t.Remote.BitLen()), Proto: proto,
		})
	}
	return l
}

// closing gives the rules that drop what goes through a tunnel interface and
// matches none of its entries, as Solaris does once there is an entry: what
// matches travels in ESP, so the rest is what the interface makes by itself.
// They come behind all entries, the first of which has priority next.
func (m *meaning) closing(rules []Rule, next uint32) []Rule {
	have := map[selKey]bool{}
	for _, t := range m.tunnelOrder {
		if t.transport {
			continue
		}
		if len(have) == 0 {
			for i := range rules {
				have[selKey{rules[i].Policy.Dir, rules[i].Policy.Sel}] = true
			}
		}
		for _, s := range t.selectors() {
			for _, p := range []ipsec.Policy{{Dir: ipsec.Out, Sel: s}, {Dir: ipsec.In, Sel: s.Reverse()}} {
				if k := (selKey{p.Dir, p.Sel}); have[k] {
					continue
				} else {
					have[k] = true
				}
				p.Action, p.Priority = ipsec.Discard, min(next, PriorityLast)
				rules = append(rules, Rule{Pos: t.first.Pos, Policy: p, Closes: true})
			}
		}
		next++
	}
	return rules
}

// systemTunnel asks the kernel for the end points of a tunnel interface, which
// are its link-layer addresses.
func systemTunnel(name string) (Tunnel, error) {
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETLINK, syscall.AF_UNSPEC)
	if err != nil {
		return Tunnel{}, err
	}
	return endsOf(rib, name)
}

// endsOf finds them in the kernel's list of links.
func endsOf(rib []byte, name string) (Tunnel, error) {
	none := errors.New("want an interface that is a tunnel with both end points; or give tladdr and traddr")
	ms, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return Tunnel{}, err
	}
	for k := range ms {
		if ms[k].Header.Type != syscall.RTM_NEWLINK || len(ms[k].Data) < syscall.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&ms[k])
		if err != nil {
			return Tunnel{}, err
		}
		var is bool
		var local, remote netip.Addr
		for _, a := range attrs {
			switch a.Attr.Type {
			case syscall.IFLA_IFNAME:
				is = len(a.Value) > 0 && string(a.Value[:len(a.Value)-1]) == name
			case syscall.IFLA_ADDRESS:
				local, _ = netip.AddrFromSlice(a.Value)
			case syscall.IFLA_BROADCAST:
				remote, _ = netip.AddrFromSlice(a.Value)
			}
		}
		// The link type keeps an Ethernet of 16 octets, if there were one, apart.
		protos := []uint8{4, 41}
		switch binary.NativeEndian.Uint16(ms[k].Data[2:]) {
		case syscall.ARPHRD_TUNNEL, syscall.ARPHRD_TUNNEL6, syscall.ARPHRD_SIT:
		case syscall.ARPHRD_IPGRE, arphrdIP6GRE:
			protos = []uint8{47}
		default:
			continue
		}
		if is && local.IsValid() && remote.IsValid() && !local.IsUnspecified() && !remote.IsUnspecified() && local.BitLen() == remote.BitLen() {
			return Tunnel{local, remote, protos}, nil
		}
	}
	return Tunnel{}, none
}

const arphrdIP6GRE = 823
