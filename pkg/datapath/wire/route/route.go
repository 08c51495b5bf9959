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
// sockets that are bound to them would be cut off. While a peer is to assign this host
// the address that policy is for, as it has before, there is the unreachable one alone.
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
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

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
