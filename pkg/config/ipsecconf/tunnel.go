package ipsecconf

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
)

// tunnelEnds are those of an interface named by "tunnel".
type tunnelEnds struct {
	local, remote netip.Addr
	transport     bool // "negotiate transport": what the interface makes is protected
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
	t := &tunnelEnds{transport: how.Value.Text == "transport"}
	err := errors.New("interfaces are not looked up")
	if m.opt.LookupTunnel != nil {
		t.local, t.remote, err = m.opt.LookupTunnel(name.Value.Text)
	}
	if err != nil {
		m.badValue(name, "%v", err)
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
		ts[i].local, ts[i].remote = m.tun.local, m.tun.remote
		if d := m.dirs; m.old != nil && len(d) > 0 && (d[0] == ipsec.In || d[0] == dirInMirrored) {
			ts[i].local, ts[i].remote = m.tun.remote, m.tun.local
		}
	}
}

// selectors of "negotiate transport": IPv4 and IPv6 in IP between the end points.
func (t *tunnelEnds) selectors() []ipsec.Selector {
	s := ipsec.Selector{
		Src: netip.PrefixFrom(t.local, t.local.BitLen()), Dst: netip.PrefixFrom(t.remote, t.remote.BitLen()), Proto: 4,
	}
	six := s
	six.Proto = 41
	return []ipsec.Selector{s, six}
}

// systemTunnel asks the kernel for the end points of a tunnel interface, which
// are its link-layer addresses.
func systemTunnel(name string) (local, remote netip.Addr, err error) {
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETLINK, syscall.AF_UNSPEC)
	if err != nil {
		return local, remote, err
	}
	return endsOf(rib, name)
}

// endsOf finds them in the kernel's list of links.
func endsOf(rib []byte, name string) (local, remote netip.Addr, err error) {
	none := errors.New("want an interface that is a tunnel with both end points; or give tladdr and traddr")
	ms, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return local, remote, err
	}
	for k := range ms {
		if ms[k].Header.Type != syscall.RTM_NEWLINK || len(ms[k].Data) < syscall.SizeofIfInfomsg {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(&ms[k])
		if err != nil {
			return local, remote, err
		}
		var is bool
		local, remote = netip.Addr{}, netip.Addr{}
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
		switch binary.NativeEndian.Uint16(ms[k].Data[2:]) {
		case syscall.ARPHRD_TUNNEL, syscall.ARPHRD_TUNNEL6, syscall.ARPHRD_SIT, syscall.ARPHRD_IPGRE, arphrdIP6GRE:
		default:
			continue
		}
		if is && local.IsValid() && remote.IsValid() && !local.IsUnspecified() && !remote.IsUnspecified() && local.BitLen() == remote.BitLen() {
			return local, remote, nil
		}
	}
	return netip.Addr{}, netip.Addr{}, none
}

const arphrdIP6GRE = 823
