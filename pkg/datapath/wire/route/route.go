// Package route leads what policy covers into the device of missiu, by routes in
// a table of its own, and takes them away again. cmd/missiu plans (Plan) with the
// policies of the key engine and hands the plan to a Table, which follows changes
// of addresses, links and other routes by itself.
//
//	rule 200, not bound to the interface:     our table, then the others as ever
//	rule 199, from 10.1.0.0/24 to 192.0.2.2:  another table, with all into the device
//
//	our table   10.2.0.0/24  dev tun0 src 10.1.0.1     protected or discarded
//	            10.2.0.0/24  unreachable, of the highest metric: if the device is
//	                         down or deleted, nothing leaves in clear
//	            0.0.0.0/0    dev tun0 ...
//	            10.1.0.0/24  throw: another interface's route, of the main table
//	            192.0.2.2    throw: a peer, within 0.0.0.0/0; rule 199 is for what
//	                         policy protects of its traffic
//
// If there are further devices, each with an address of its own, a route whose
// source is such an address goes into that device. Where policy allows several of
// them as sources, each has a route with its device, the first in order of address
// with the best metric; the others are for sockets that are bound to their devices.
//
// No route of the operator's is touched. A throw has the kernel look into the
// next table, so an excluded destination follows the main table whatever becomes
// of it. What is protected by policy wins over routes by the interface that
// missiu is for, and loses to more specific ones by other interfaces. Where those
// have a less specific one, there is no unreachable route behind the device's, or
// sockets that are bound to them would be cut off.
//
// Nothing of ours comes back into the device: ESP leaves by sockets that are
// bound to the interface, for which the kernel's rule does not hold, or without
// the kernel's routes; IKE that is routed here is exempt from policy in the data
// path and leaves by the interface.
//
// Table and rules survive a process that is killed, as the device does, so that
// what they lead there goes nowhere. Cleanup removes them.
package route

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/statefile"
)

// Dir is where the number of the table is kept. Tests change it.
var Dir = "/run/missiu"

const (
	// Priority of the rules: before main (32766), after local (0). Those for what
	// peers are not excluded from come one before.
	Priority = 200
	// firstTable and the index of the interface make the number of the table.
	firstTable = 0x6d690000
	// protocol marks routes and rules as ours; /etc/iproute2/rt_protos leaves it free.
	protocol = 109
	// lastMetric is that of the unreachable routes.
	lastMetric = 1<<31 - 1
	// metric6 is the kernel's for IPv6 routes without one; for IPv4 it is 0.
	metric6 = 1024
	// exceptions and the number of the table make that of the second one.
	exceptions = 0x10000
)

// Timing of what follows changes.
const (
	settle = 20 * time.Millisecond
	again  = time.Second
)

// Options of Open.
type Options struct {
	Interface string // the physical one
	Index     int    // its index
	Device    int    // index of the TAP or TUN, which is up
	// More returns the indexes of further TUNs of ours, with an address each (see
	// package tap's Set); nil: there are none.
	More func() []int
}

// Table is the routes of one instance. It is safe for concurrent use.
type Table struct {
	o      Options
	table  int
	handle *netlink.Handle
	events *nl.Conn
	kick   chan struct{}
	stop   chan struct{}
	errs   chan error
	done   sync.WaitGroup

	closing sync.Once

	mu     sync.Mutex
	wants  []Want
	leaves netip.Addr // see Without
	fresh  bool       // Apply was called
	closed bool
	count  int // destinations in the device
}

func file(ifname string) string { return filepath.Join(Dir, ifname+".routes") }

// Open makes the rules. A table that a killed instance left stays as it is until
// the first Apply.
func Open(o Options) (*Table, error) {
	t := &Table{o: o, table: firstTable + o.Index, kick: make(chan struct{}, 1), stop: make(chan struct{}), errs: make(chan error, 1)}
	if n := saved(o.Interface); n != 0 { // what it has is adopted
		t.table = n
	} else if err := statefile.Write(file(o.Interface), []byte(strconv.Itoa(t.table)+"\n")); err != nil {
		return nil, err
	}
	var err error
	if t.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if t.events, err = listen(); err != nil {
		t.handle.Close()
		return nil, err
	}
	if err = t.addRules(); err != nil {
		t.events.Close()
		t.handle.Close()
		return nil, err
	}
	t.done.Add(2)
	go t.listen()
	go t.follow()
	return t, nil
}

// saved returns the table of an instance that was killed, 0 if there is none.
func saved(ifname string) int {
	b, err := os.ReadFile(file(ifname))
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || n <= firstTable {
		return 0 // not by us
	}
	return n
}

var families = []int{unix.AF_INET, unix.AF_INET6}

// rule: lookups for sockets that are bound to the interface do without the
// table, or the unreachable routes in it would catch ESP.
func rule(family, table int, ifname string) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Table, r.Priority, r.Protocol = family, table, Priority, protocol
	r.OifName, r.Invert = ifname, true
	return r
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

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (t *Table) addRules() error {
	for _, f := range families {
		err := t.handle.RuleAdd(rule(f, t.table, t.o.Interface))
		switch {
		case err == nil, errors.Is(err, unix.EEXIST), f == unix.AF_INET6 && noIPv6():
		case lacks(err):
			return fmt.Errorf("rule: %w (the kernel needs CONFIG_IP_MULTIPLE_TABLES and CONFIG_IPV6_MULTIPLE_TABLES)", err)
		default:
			return fmt.Errorf("rule: %w", err)
		}
	}
	return nil
}

func noIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return errors.Is(err, os.ErrNotExist)
}

// lacks: the host has not this family, or the kernel was built without it.
func lacks(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// Cleanup removes what an instance for ifname has made; it reports whether there was anything.
// Routes over a device that is gone are gone already.
func Cleanup(ifname string) (bool, error) {
	table := saved(ifname)
	if table == 0 {
		return false, nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return true, err
	}
	defer h.Close()
	for _, f := range families {
		rules, e := dump(func() ([]netlink.Rule, error) { return h.RuleList(f) })
		err = errors.Join(err, e)
		for i := range rules {
			r := &rules[i]
			r.Family = f
			switch r.Table {
			case table:
				if h.RuleDel(r) != nil {
					// Its interface is gone, and with it the name that identifies it.
					err = errors.Join(err, h.RuleDel(rule(f, table, ifname)))
				}
			case table + exceptions:
				err = errors.Join(err, gone(h.RuleDel(r)))
			}
		}
		rs, e := tables(h, f)
		err = errors.Join(err, e)
		for i := range rs {
			if rs[i].Table == table || rs[i].Table == table+exceptions {
				err = errors.Join(err, gone(h.RouteDel(&rs[i])))
			}
		}
	}
	if err != nil {
		return true, err
	}
	return true, os.Remove(file(ifname))
}

// gone is nil for what was not there to be deleted.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
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

// tables returns the routes of all tables.
func tables(h *netlink.Handle, family int) ([]netlink.Route, error) {
	return dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
}

// Close ends following, and leaves everything in place; Apply does nothing any more.
func (t *Table) Close() {
	t.closing.Do(func() {
		close(t.stop)
		t.mu.Lock()
		t.closed = true
		t.mu.Unlock()
		t.events.Close()
		t.done.Wait()
		t.handle.Close()
	})
}

// Number of the table, and how many destinations it leads into the device.
func (t *Table) Number() (table, destinations int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table, t.count
}

// Errors delivers what went wrong while following a change, once for the same
// error; it is tried again until it succeeds, which delivers nil.
func (t *Table) Errors() <-chan error { return t.errs }

// Apply makes the table what wants says and what follows from the state of the
// host. When it returns nil all is in force.
func (t *Table) Apply(wants []Want) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.wants, t.fresh = slices.Clone(wants), true
	err := t.reconcile()
	if err != nil {
		t.wake()
	}
	return err
}

// Without calls f, which takes the address a from the host, while no route names
// it: the kernel would take routes that do away with it, and where nothing
// unreachable is behind them their packets would leave in clear until they are
// back. It returns what f does; of routes that are not as they are to be tells
// Errors.
func (t *Table) Without(a netip.Addr, f func() error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || !t.fresh {
		return f()
	}
	t.leaves = a
	if t.reconcile() != nil {
		t.wake()
	}
	err := f()
	t.leaves = netip.Addr{}
	if t.reconcile() != nil {
		t.wake()
	}
	return err
}

func (t *Table) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// groups whose events make us look again. Their contents do not matter, so a
// lost one costs nothing.
var groups = []uint32{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

func listen() (*nl.Conn, error) {
	c, err := nl.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		if err := c.JoinGroup(g); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

func (t *Table) listen() {
	defer t.done.Done()
	for {
		_, err := t.events.Receive()
		select {
		case <-t.stop:
			return
		default:
		}
		t.wake()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			select {
			case <-t.stop:
				return
			case <-time.After(again):
			}
		}
	}
}

// follow looks again after changes by others.
func (t *Table) follow() {
	defer t.done.Done()
	told := "" // the error
	for {
		select {
		case <-t.stop:
			return
		case <-t.kick:
		}
		select {
		case <-t.stop:
			return
		case <-time.After(settle):
		}
		t.mu.Lock()
		var err error
		if t.fresh && !t.closed {
			if err = t.addRules(); err == nil {
				err = t.reconcile()
			}
		}
		t.mu.Unlock()
		text := ""
		if err != nil {
			text = err.Error()
			time.AfterFunc(again, t.wake)
		}
		if text != told {
			t.tell(err)
		}
		told = text
	}
}

// tell replaces news that nobody took.
func (t *Table) tell(err error) {
	select {
	case <-t.errs:
	default:
	}
	t.errs <- err // the only sender, so there is room
}

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

// host is what the routes depend on.
type host struct {
	owned  map[netip.Addr]int    // addresses; not 0: the device of ours that has it
	others map[netip.Prefix]bool // destinations that the main table leads elsewhere
	ours   []netlink.Route
	rules  []netlink.Rule // of the second table
}

// look reads it.
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
		for k, e := range t.into(w, h) {
			m[key{dst: w.Dst, rank: k}] = e
		}
		if !around(h.others, w.Dst) {
			m[key{dst: w.Dst, backup: true}] = entry{}
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
// selector in which it has one: one that the plan prefers, else the device's, else what the kernel would take without
// us, else the lowest. The zero Addr: there is none.
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

// prefixOf is n, the zero Prefix if it is nil.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a, bits)
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
