package route

import (
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// key is what the kernel tells routes apart by.
type key struct {
	dst    netip.Prefix
	backup bool
	second bool // in the second table
	rank   int  // among those into devices; 0 is the first choice
}

// entry is one route as it is to be.
type entry struct {
	throw bool
	dev   int // into which it leads; 0: none
	src   netip.Addr
}

// want is the table as it is to be on h.
func (t *Table) want(h *host) map[key]entry {
	m := make(map[key]entry, 2*len(t.wants))
	p := plan{wants: make(map[netip.Prefix]*Want, len(t.wants))}
	t.count = 0
	for i := range t.wants {
		w := &t.wants[i]
		p.wants[w.Dst] = w
		if w.Pass {
			m[key{dst: w.Dst}] = entry{throw: true}
			continue
		}
		l := t.into(w, h)
		wait := w.Await && !l[0].src.IsValid()
		if wait || !around(h.others, w.Dst) {
			m[key{dst: w.Dst, backup: true}] = entry{}
		}
		if wait {
			continue
		}
		for k, e := range l {
			m[key{dst: w.Dst, rank: k}] = e
		}
		t.count++
	}
	for _, w := range t.wants {
		if len(w.Except) > 0 {
			all, _ := w.Dst.Addr().Prefix(0)
			m[key{dst: all, second: true}], m[key{dst: all, backup: true, second: true}] = entry{dev: t.o.Device}, entry{}
		}
	}
	for d := range h.others {
		if p.swallowed(d) {
			m[key{dst: d}] = entry{throw: true}
		}
	}
	return m
}

// around reports whether one of ps holds d.
func around(ps map[netip.Prefix]bool, d netip.Prefix) bool {
	for n := d.Bits(); n >= 0; n-- {
		if p, _ := d.Addr().Prefix(n); ps[p] {
			return true
		}
	}
	return false
}

// into are the routes to w.Dst, best first: that of source, and one by each other
// device with an address that policy allows.
func (t *Table) into(w *Want, h *host) []entry {
	first := entry{dev: t.o.Device, src: t.source(w, h)}
	if d := h.owned[first.src]; d != 0 {
		first.dev = d
	}
	l := []entry{first}
	if t.o.More == nil {
		return l
	}
	for _, local := range w.Local {
		for _, a := range h.fit(local, w.Dst.Addr().BitLen(), true) {
			d := h.owned[a]
			if d != t.o.Device && !slices.ContainsFunc(l, func(e entry) bool { return e.dev == d }) {
				l = append(l, entry{dev: d, src: a})
			}
		}
	}
	return l
}

// fit are the addresses in local of a family, lowest first; ours: of our devices.
func (h *host) fit(local netip.Prefix, bits int, ours bool) (l []netip.Addr) {
	for a, d := range h.owned {
		if local.Contains(a) && a.BitLen() == bits && (d != 0 || !ours) {
			l = append(l, a)
		}
	}
	slices.SortFunc(l, netip.Addr.Compare)
	return l
}

// source is the address that packets of this host to w.Dst come from, of the first
// selector in which it has one: one that the plan prefers, else the device's, else what
// the kernel would take without us, else the lowest. The zero Addr: there is none.
func (t *Table) source(w *Want, h *host) netip.Addr {
	bits := w.Dst.Addr().BitLen()
	for _, local := range w.Local {
		for _, a := range w.Prefer {
			if _, ok := h.owned[a]; ok && local.Contains(a) {
				return a
			}
		}
		if l := h.fit(local, bits, true); len(l) > 0 {
			return l[0]
		}
		l := h.fit(local, bits, false)
		if len(l) == 0 {
			continue
		}
		if len(l) > 1 {
			if a := t.usual(w.Dst.Addr()); slices.Contains(l, a) {
				return a
			}
		}
		return l[0]
	}
	return netip.Addr{}
}

// usual is the source of packets to dst by the interface.
func (t *Table) usual(dst netip.Addr) netip.Addr {
	rs, err := t.handle.RouteGetWithOptions(dst.AsSlice(), &netlink.RouteGetOptions{OifIndex: t.o.Index})
	if err != nil || len(rs) == 0 {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(rs[0].Src)
	return a.Unmap()
}
