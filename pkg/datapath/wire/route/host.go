package route

import (
	"errors"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// host is what the routes depend on.
type host struct {
	owned  map[netip.Addr]int    // addresses; not 0: the device of ours that has it
	others map[netip.Prefix]bool // destinations that the main table leads elsewhere
	ours   []netlink.Route
	rules  []netlink.Rule // of the second table
}

// look reads what the host has now.
func (t *Table) look() (*host, error) {
	addrs, err := dump(func() ([]netlink.Addr, error) { return t.handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	h := &host{owned: map[netip.Addr]int{}, others: map[netip.Prefix]bool{}}
	ours := t.devices()
	for i := range addrs {
		a, ok := netip.AddrFromSlice(addrs[i].IP)
		if a = a.Unmap(); ok && a != t.leaves && addrs[i].Flags&unix.IFA_F_TENTATIVE == 0 && !a.IsLinkLocalUnicast() && !a.IsLoopback() {
			h.owned[a] = 0
			if slices.Contains(ours, addrs[i].LinkIndex) {
				h.owned[a] = addrs[i].LinkIndex
			}
		}
	}
	for _, f := range families {
		rs, err := tables(t.handle, f)
		if err != nil {
			return nil, err
		}
		for i := range rs {
			switch r := &rs[i]; {
			case r.Table == t.table, r.Table == t.table+exceptions:
				h.ours = append(h.ours, *r)
			case r.Table == unix.RT_TABLE_MAIN && t.elsewhere(r, ours):
				if d, ok := destination(r); ok {
					h.others[d] = true
				}
			}
		}
		rules, err := dump(func() ([]netlink.Rule, error) { return t.handle.RuleList(f) })
		if err != nil {
			return nil, err
		}
		for i := range rules {
			if r := rules[i]; r.Table == t.table+exceptions {
				r.Family = f
				h.rules = append(h.rules, r)
			}
		}
	}
	return h, nil
}

// devices are ours.
func (t *Table) devices() []int {
	if t.o.More == nil {
		return []int{t.o.Device}
	}
	return append(t.o.More(), t.o.Device)
}

// elsewhere: neither by the interface nor into a device of ours.
func (t *Table) elsewhere(r *netlink.Route, ours []int) bool {
	if r.Type == unix.RTN_UNICAST && len(r.MultiPath) > 0 {
		return slices.ContainsFunc(r.MultiPath, func(n *netlink.NexthopInfo) bool { return n.LinkIndex != t.o.Index })
	}
	return r.Type != unix.RTN_UNICAST || r.LinkIndex != t.o.Index && !slices.Contains(ours, r.LinkIndex)
}

func destination(r *netlink.Route) (netip.Prefix, bool) {
	if r.Dst == nil {
		if r.Family == unix.AF_INET6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0), r.Family == unix.AF_INET
	}
	a, ok := netip.AddrFromSlice(r.Dst.IP)
	n, _ := r.Dst.Mask.Size()
	if r.Family == unix.AF_INET {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, n), ok
}

// tables returns the routes of all tables.
func tables(h *netlink.Handle, family int) ([]netlink.Route, error) {
	return dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
}

// dump repeats what changes have cut short.
func dump[T any](f func() ([]T, error)) (l []T, err error) {
	for range 5 {
		if l, err = f(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if lacks(err) {
		return nil, nil
	}
	return l, err
}

// lacks: the host has not this family, or the kernel was built without it.
func lacks(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func noIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return errors.Is(err, os.ErrNotExist)
}
