package route

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// reconcile compares the table with what it is to be, and changes what differs.
// Exclusions come before what they are excluded from, and go after it.
func (t *Table) reconcile() error {
	h, err := t.look()
	if err != nil {
		return err
	}
	want := t.want(h)
	ours := t.devices()
	have := map[key]entry{}
	var extra []*netlink.Route
	for i := range h.ours {
		k, e, ok := t.read(&h.ours[i], ours)
		if _, wanted := want[k]; !ok || !wanted {
			extra = append(extra, &h.ours[i])
			continue
		}
		have[k] = e
	}
	var keys []key
	for k, w := range want {
		if e, ok := have[k]; !ok || e != w {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b key) int {
		if x, y := want[a].throw, want[b].throw; x != y {
			if x {
				return -1
			}
			return 1
		}
		if c := compare(a.dst, b.dst); c != 0 {
			return c
		}
		return a.rank - b.rank
	})
	var errs []error
	for _, k := range keys {
		if err := t.put(k, want[k]); err != nil && !(k.dst.Addr().Is6() && noIPv6()) {
			errs = append(errs, fmt.Errorf("route to %v: %w", k.dst, err))
		}
	}
	errs = append(errs, t.except(h.rules))
	slices.SortStableFunc(extra, func(a, b *netlink.Route) int { return rank(a) - rank(b) })
	for _, r := range extra {
		if err := gone(t.handle.RouteDel(r)); err != nil {
			errs = append(errs, fmt.Errorf("route to %v: %w", r.Dst, err))
		}
	}
	return errors.Join(errs...)
}

func (t *Table) put(k key, e entry) error {
	r := &netlink.Route{Table: t.table, Protocol: protocol, Dst: ipNet(k.dst)}
	if k.second {
		r.Table += exceptions
	}
	switch {
	case e.throw:
		r.Type = unix.RTN_THROW
	case k.backup:
		r.Type, r.Priority = unix.RTN_UNREACHABLE, lastMetric
	default:
		// Its scope is not that of a link, or the kernel would look for gateways
		// of other routes there.
		r.LinkIndex = e.dev
		if k.rank > 0 {
			if r.Priority = k.rank; k.dst.Addr().Is6() {
				r.Priority += metric6
			}
		}
		if e.src.IsValid() {
			r.Src = e.src.AsSlice()
		}
	}
	err := t.handle.RouteReplace(r)
	if errors.Is(err, unix.EINVAL) && r.Src != nil { // an address that is not usable yet, or has just gone
		r.Src = nil
		err = t.handle.RouteReplace(r)
	}
	return err
}

// read says what a route of the table is; false: nothing of ours.
func (t *Table) read(r *netlink.Route, ours []int) (k key, e entry, ok bool) {
	if k.dst, ok = destination(r); !ok {
		return k, e, false
	}
	k.second = r.Table != t.table
	switch {
	case r.Type == unix.RTN_THROW:
		e.throw = true
	case r.Type == unix.RTN_UNREACHABLE && r.Priority == lastMetric:
		k.backup = true
	case r.Type != unix.RTN_UNICAST || !slices.Contains(ours, r.LinkIndex):
		return k, e, false
	default:
		e.dev, k.rank = r.LinkIndex, r.Priority
		if k.dst.Addr().Is6() {
			k.rank -= metric6
		}
		if len(r.Src) != 0 {
			e.src, _ = netip.AddrFromSlice(r.Src)
			e.src = e.src.Unmap()
		}
	}
	return k, e, true
}

// rank orders deletions: the device's routes, those behind them, exclusions.
func rank(r *netlink.Route) int {
	switch r.Type {
	case unix.RTN_UNICAST:
		return 0
	case unix.RTN_THROW:
		return 2
	}
	return 1
}

// gone is nil for what was not there to be deleted.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// except makes rules have the exceptions, given those that there are.
func (t *Table) except(rules []netlink.Rule) error {
	type pair struct{ src, dst netip.Prefix }
	have := map[pair]*netlink.Rule{}
	var errs []error
	for i := range rules {
		r := &rules[i]
		p := pair{prefixOf(r.Src), prefixOf(r.Dst)}
		if r.Src == nil { // all
			p.src, _ = p.dst.Addr().Prefix(0)
		}
		have[p] = r
	}
	for _, w := range t.wants {
		for _, src := range w.Except {
			p := pair{src.Masked(), w.Dst}
			if have[p] != nil {
				delete(have, p)
				continue
			}
			if err := t.handle.RuleAdd(exception(t.table, p.src, p.dst)); err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("rule for %v to %v: %w", p.src, p.dst, err))
			}
		}
	}
	for p, r := range have {
		if err := gone(t.handle.RuleDel(r)); err != nil {
			errs = append(errs, fmt.Errorf("rule for %v to %v: %w", p.src, p.dst, err))
		}
	}
	return errors.Join(errs...)
}

// exception leads what comes from src and goes to dst into the device.
func exception(table int, src, dst netip.Prefix) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Table, r.Priority, r.Protocol = unix.AF_INET, table+exceptions, Priority-1, protocol
	if dst.Addr().Is6() {
		r.Family = unix.AF_INET6
	}
	r.Src, r.Dst = ipNet(src), ipNet(dst)
	return r
}

// prefixOf is n, the zero Prefix if it is nil.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a, bits)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
