package wire

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/gaissmai/bart"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// chain is the table that keeps packets from the stack:
//
//	table netdev missiu-<if> {
//	    chain ingress { type filter hook ingress device <if> priority -500
//	        meta pkttype otherhost accept     # promiscuous neighbours, macvlan
//	        vlan id != 0 accept               # other interfaces'
//	        vlan id 0 vlan type vlan vlan id 0 drop
//	        meta protocol ip goto v4
//	        meta protocol ip6 goto v6 }
//	    chain v4 {
//	        ip protocol {esp, ah, comp} ip daddr @local4 drop
//	        ip saddr != @divert4 ip saddr != @host4 accept
//	        ip frag-off & 0x3fff == 0 udp dport {500, 4500} ip daddr @local4 accept
//	        drop }
//	    chain v6 { likewise; neighbour discovery accept } }
//
// A tag with identifier 0 carries a priority only (IEEE 802.1Q, 9.6): the stack
// takes it off, as many as there are, and the packet for this interface's.
//
// Of the divert set, single addresses are in a set of their own, which the
// kernel hashes: it changes one at a cost that does not depend on their number,
// where of intervals it makes an array anew (Linux 6.18.44: 10 ms for 100,000).
//
// The reader applies the same test (sets.judge). A chain without owner stays
// when its maker is killed: what policy protects stays protected.
type chain struct {
	mu    sync.Mutex
	c     *nftables.Conn
	table *nftables.Table
	set   map[string]*nftables.Set

	ifname string
	pid    uint32         // netlink's, of c
	ruled  map[string]int // rules of each chain

	// Contents of the sets, for changes and for mend. known: those of the
	// divert sets are what we put there, as far as we know.
	local            []netip.Addr
	divert4, divert6 cover
	hosts            *bart.Lite // its single addresses are host4 and host6
	known            bool
}

// tableName makes an identifier of nft's language of an interface name, which
// may hold nearly any octet; different names stay different.
func tableName(ifname string) string {
	var b strings.Builder
	b.WriteString("missiu-")
	for _, c := range []byte(ifname) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return b.String()
}

// dialNft returns a connection, and the netlink port by which the kernel tells
// its changes from those of others.
func dialNft() (c *nftables.Conn, pid uint32, err error) {
	c, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		// A transaction of 100,000 prefixes is one message.
		if err := errors.Join(c.SetWriteBuffer(64<<20), c.SetReadBuffer(8<<20)); err != nil {
			return err
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		var name unix.Sockaddr
		e := raw.Control(func(fd uintptr) { name, err = unix.Getsockname(int(fd)) })
		if a, ok := name.(*unix.SockaddrNetlink); ok {
			pid = a.Pid
		}
		return errors.Join(e, err)
	}))
	return c, pid, err
}

// findTable returns the table of an interface, nil if there is none.
func findTable(c *nftables.Conn, ifname string) (*nftables.Table, error) {
	ts, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return nil, missing(nftError(err))
	}
	for _, t := range ts {
		if t.Name == tableName(ifname) {
			return t, nil
		}
	}
	return nil, nil
}

func nftError(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, os.ErrPermission) {
		return &tap.PrivilegeError{Op: "nftables", Capability: "CAP_NET_ADMIN", Err: unix.EPERM}
	}
	return fmt.Errorf("nftables: %w", err)
}

// missing adds to the error of the first request what it means when the kernel
// does not know of tables at all.
func missing(err error) error {
	if noTables(err) {
		return fmt.Errorf("%w (load the kernel module nf_tables)", err)
	}
	return err
}

// noTables: the kernel does not know of tables.
func noTables(err error) bool {
	return slices.ContainsFunc([]error{unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT}, func(e error) bool { return errors.Is(err, e) })
}

// newChain makes the table. One that a killed instance left is replaced in the
// same transaction, and its divert sets are carried over.
func newChain(ifname string, local []netip.Addr) (*chain, error) {
	c, pid, err := dialNft()
	if err != nil {
		return nil, missing(nftError(err))
	}
	h := &chain{c: c, ifname: ifname, pid: pid, local: local, hosts: table()}
	old, err := findTable(c, ifname)
	if err == nil && old != nil {
		err = h.inherit(old)
	}
	if err == nil {
		err = h.build(old)
	}
	if err != nil {
		c.CloseLasting()
		return nil, err
	}
	return h, nil
}

// inherit reads the divert sets of the table that a killed instance left.
func (h *chain) inherit(old *nftables.Table) error {
	for name, c := range map[string]*cover{"divert4": &h.divert4, "divert6": &h.divert6} {
		s, err := h.c.GetSetByName(old, name)
		if err != nil {
			continue // a table that an earlier version or somebody else made
		}
		es, err := h.c.GetSetElements(s)
		if err != nil {
			return nftError(err)
		}
		*c = ranges(es)
	}
	for _, name := range []string{"host4", "host6"} {
		s, err := h.c.GetSetByName(old, name)
		if err != nil {
			continue
		}
		es, err := h.c.GetSetElements(s)
		if err != nil {
			return nftError(err)
		}
		for _, e := range es {
			if a, ok := netip.AddrFromSlice(e.Key); ok {
				h.hosts.Insert(netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	return nil
}

// build makes the table with its contents in one transaction, in which old, if
// not nil, goes.
func (h *chain) build(old *nftables.Table) error {
	if old != nil {
		h.c.DelTable(old)
	}
	h.table = h.c.AddTable(&nftables.Table{Family: nftables.TableFamilyNetdev, Name: tableName(h.ifname)})
	h.set, h.ruled = map[string]*nftables.Set{}, map[string]int{}
	local4, local6 := split(h.local)
	for _, s := range []struct {
		name     string
		kind     nftables.SetDatatype
		interval bool
		contents []nftables.SetElement
	}{
		{"divert4", nftables.TypeIPAddr, true, intervals(h.divert4)},
		{"divert6", nftables.TypeIP6Addr, true, intervals(h.divert6)},
		{"host4", nftables.TypeIPAddr, false, single(hosts(h.hosts.All4()))},
		{"host6", nftables.TypeIP6Addr, false, single(hosts(h.hosts.All6()))},
		{"local4", nftables.TypeIPAddr, false, single(local4)},
		{"local6", nftables.TypeIP6Addr, false, single(local6)},
	} {
		set := &nftables.Set{Table: h.table, Name: s.name, KeyType: s.kind, Interval: s.interval, KeyByteOrder: binaryutil.BigEndian}
		if err := h.c.AddSet(set, nil); err != nil {
			return nftError(err)
		}
		h.set[s.name] = set
		if err := inChunks(h.c.SetAddElements, set, s.contents); err != nil {
			return nftError(err)
		}
	}
	h.rules(h.ifname)
	if err := h.c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

// ranges makes of the elements of an interval set, in any order, what they hold.
func ranges(es []nftables.SetElement) cover {
	slices.SortFunc(es, func(a, b nftables.SetElement) int {
		if c := slices.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		end := func(e nftables.SetElement) int {
			if e.IntervalEnd {
				return 0
			}
			return 1
		}
		return cmp.Compare(end(a), end(b))
	})
	var c cover
	open := false // the last range has no end yet
	for _, e := range es {
		a, ok := netip.AddrFromSlice(e.Key)
		switch {
		case !ok || e.IntervalEnd != open:
			// The kernel's own element for "nothing below", or nothing of ours.
		case open:
			c[len(c)-1].last, open = a.Prev(), false
		default:
			c, open = append(c, span{a, spanOf(netip.PrefixFrom(a, 0)).last}), true
		}
	}
	return join(c)
}

func split(as []netip.Addr) (v4, v6 []netip.Addr) {
	for _, a := range as {
		if a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	return v4, v6
}

// hosts are the addresses of prefixes that have one, nets the other prefixes.
func hosts(ps iter.Seq[netip.Prefix]) (as []netip.Addr) {
	for p := range ps {
		if p.IsSingleIP() {
			as = append(as, p.Addr())
		}
	}
	return as
}

func nets(ps iter.Seq[netip.Prefix]) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		for p := range ps {
			if !p.IsSingleIP() && !yield(p) {
				return
			}
		}
	}
}

func single(as []netip.Addr) []nftables.SetElement {
	var es []nftables.SetElement
	for _, a := range as {
		es = append(es, nftables.SetElement{Key: a.AsSlice()})
	}
	return es
}

// intervals turns ranges into set elements: first, and one past the last.
func intervals(rs cover) []nftables.SetElement {
	var es []nftables.SetElement
	for _, r := range rs {
		es = append(es, nftables.SetElement{Key: r.first.AsSlice()})
		if end := r.last.Next(); end.IsValid() {
			es = append(es, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return es
}

// elementsPerMessage keeps an attribute list below its 16-bit length.
const elementsPerMessage = 1000

func inChunks(f func(*nftables.Set, []nftables.SetElement) error, s *nftables.Set, es []nftables.SetElement) error {
	for c := range slices.Chunk(es, elementsPerMessage) {
		if err := f(s, c); err != nil {
			return err
		}
	}
	return nil
}

// replace exchanges the contents of sets in one transaction.
func (h *chain) replace(contents map[string][]nftables.SetElement) error {
	for name, es := range contents {
		h.c.FlushSet(h.set[name])
		if err := inChunks(h.c.SetAddElements, h.set[name], es); err != nil {
			return nftError(err)
		}
	}
	if err := h.c.Flush(); err != nil {
		return nftError(err)
	}
	return nil
}

// setDivert puts next in force, which differs from the contents of the divert
// sets in changed at most; nil means anywhere.
func (h *chain) setDivert(next *bart.Lite, changed []netip.Prefix) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	// An error is a reason to exchange all: somebody has changed the sets.
	if changed != nil && h.known && h.patch(next, changed) == nil {
		return nil
	}
	v4, v6 := coverOf(nets(next.All4())), coverOf(nets(next.All6()))
	err := h.replace(map[string][]nftables.SetElement{
		"divert4": intervals(v4), "divert6": intervals(v6),
		"host4": single(hosts(next.All4())), "host6": single(hosts(next.All6())),
	})
	if h.known = err == nil; h.known {
		h.divert4, h.divert6, h.hosts = v4, v6, next
	}
	return err
}

// patch is setDivert by the elements that differ. They go and come as whole
// ranges: half a one is nothing to the kernel.
func (h *chain) patch(next *bart.Lite, changed []netip.Prefix) error {
	type step struct {
		c *cover
		s splice
	}
	var steps []step
	diff := map[*cover]map[span]int{&h.divert4: {}, &h.divert6: {}}
	alone := map[netip.Addr]int{}
	for _, p := range changed {
		if p.IsSingleIP() {
			switch was, is := h.hosts.Get(p), next.Get(p); {
			case was && !is:
				alone[p.Addr()] = -1
			case !was && is:
				alone[p.Addr()] = 1
			}
			continue
		}
		c := &h.divert4
		if p.Addr().Is6() {
			c = &h.divert6
		}
		inner := cover{spanOf(p)}
		if !next.LookupPrefix(p) {
			inner = coverOf(nets(next.Subnets(p)))
		}
		s := c.set(spanOf(p), inner)
		for _, r := range s.old {
			diff[c][r]--
		}
		for _, r := range (*c)[s.at : s.at+s.n] {
			diff[c][r]++
		}
		steps = append(steps, step{c, s})
	}
	var gone, come [2][]netip.Addr // of IPv4, of IPv6
	for a, n := range alone {
		l := &come
		if n < 0 {
			l = &gone
		}
		l[a.BitLen()/128] = append(l[a.BitLen()/128], a)
	}
	less4, more4 := sides(diff[&h.divert4])
	less6, more6 := sides(diff[&h.divert6])
	err := errors.Join(
		inChunks(h.c.SetDeleteElements, h.set["divert4"], intervals(less4)),
		inChunks(h.c.SetDeleteElements, h.set["divert6"], intervals(less6)),
		inChunks(h.c.SetDeleteElements, h.set["host4"], single(gone[0])),
		inChunks(h.c.SetDeleteElements, h.set["host6"], single(gone[1])),
		inChunks(h.c.SetAddElements, h.set["divert4"], intervals(more4)),
		inChunks(h.c.SetAddElements, h.set["divert6"], intervals(more6)),
		inChunks(h.c.SetAddElements, h.set["host4"], single(come[0])),
		inChunks(h.c.SetAddElements, h.set["host6"], single(come[1])))
	if err == nil {
		err = h.c.Flush()
	}
	if err != nil {
		for _, s := range slices.Backward(steps) {
			s.c.undo(s.s)
		}
		return err
	}
	h.hosts = next
	return nil
}

// sides are the ranges counted below 0 and those above, ascending.
func sides(diff map[span]int) (less, more cover) {
	for r, n := range diff {
		switch {
		case n < 0:
			less = append(less, r)
		case n > 0:
			more = append(more, r)
		}
	}
	for _, c := range []cover{less, more} {
		slices.SortFunc(c, func(a, b span) int { return a.first.Compare(b.first) })
	}
	return less, more
}

func (h *chain) setLocal(as []netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v4, v6 := split(as)
	err := h.replace(map[string][]nftables.SetElement{"local4": single(v4), "local6": single(v6)})
	if err == nil {
		h.local = as
	}
	return err
}

// close deletes the table.
func (h *chain) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.c.DelTable(h.table)
	err := h.c.Flush()
	h.c.CloseLasting()
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nftError(err)
	}
	return nil
}

// removeTable deletes what a killed instance left.
func removeTable(ifname string) (bool, error) {
	c, _, err := dialNft()
	if noTables(err) {
		return false, nil
	}
	if err != nil {
		return false, nftError(err)
	}
	defer c.CloseLasting()
	t, err := findTable(c, ifname)
	if t == nil && noTables(err) {
		return false, nil
	}
	if t == nil || err != nil {
		return false, err
	}
	c.DelTable(t)
	if err := c.Flush(); err != nil {
		return false, nftError(err)
	}
	return true, nil
}

// rules. All offsets are of the base named.
func (h *chain) rules(ifname string) {
	prio := nftables.ChainPriority(-500)
	accept := nftables.ChainPolicyAccept
	v4 := h.c.AddChain(&nftables.Chain{Name: "v4", Table: h.table})
	v6 := h.c.AddChain(&nftables.Chain{Name: "v6", Table: h.table})
	in := h.c.AddChain(&nftables.Chain{
		Name: "ingress", Table: h.table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress,
		Priority: &prio, Policy: &accept, Device: ifname,
	})
	rule := func(c *nftables.Chain, parts ...[]expr.Any) {
		h.c.AddRule(&nftables.Rule{Table: h.table, Chain: c, Exprs: slices.Concat(parts...)})
		h.ruled[c.Name]++
	}
	const link, network, transport = expr.PayloadBaseLLHeader, expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	const eq = expr.CmpOpEq
	otherHost := []expr.Any{&expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: 1}, &expr.Cmp{Op: eq, Register: 1, Data: []byte{unix.PACKET_OTHERHOST}}}
	rule(in, otherHost, verdictExpr(expr.VerdictAccept, ""))
	drop, pass := verdictExpr(expr.VerdictDrop, ""), verdictExpr(expr.VerdictAccept, "")
	for _, outer := range vlanTypes {
		tagged := field(link, 12, eq, outer...)
		rule(in, tagged, vlanID(14, expr.CmpOpNeq), pass)
		for _, inner := range vlanTypes {
			rule(in, tagged, field(link, 16, eq, inner...), vlanID(18, eq), drop)
		}
	}
	rule(in, protocol(0x08, 0x00), verdictExpr(expr.VerdictGoto, "v4"))
	rule(in, protocol(0x86, 0xdd), verdictExpr(expr.VerdictGoto, "v6"))

	toLocal4 := h.member("local4", 16, 4, false)
	for _, p := range []byte{protoESP, protoAH, protoIPComp} {
		rule(v4, field(network, 9, eq, p), toLocal4, drop)
	}
	rule(v4, h.member("divert4", 12, 4, true), h.member("host4", 12, 4, true), pass)
	whole := []expr.Any{
		&expr.Payload{DestRegister: 1, Base: network, Offset: 6, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0x3f, 0xff}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: eq, Register: 1, Data: []byte{0, 0}},
	}
	for _, port := range []uint16{portIKE, portNATT} {
		p := binary.BigEndian.AppendUint16(nil, port)
		// Octets 2 to 7: also the rest of the header must be there.
		rule(v4, field(network, 9, eq, protoUDP), whole, field(transport, 2, eq, p...), present(transport, 6, 2), toLocal4, pass)
	}
	rule(v4, drop)

	toLocal6 := h.member("local6", 24, 16, false)
	for _, p := range []byte{protoESP, protoAH, protoIPComp} {
		// The kernel's walk along headers reads nonsense where the packet's front
		// lies in fragments of the buffer, as of jumbo frames from AF_PACKET.
		rule(v6, field(network, 6, eq, p), toLocal6, drop)
		l4 := []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: eq, Register: 1, Data: []byte{p}}}
		if p == protoAH { // an extension header to the kernel
			l4 = []expr.Any{
				&expr.Exthdr{DestRegister: 1, Type: protoAH, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6},
				&expr.Cmp{Op: eq, Register: 1, Data: []byte{1}},
			}
		}
		rule(v6, l4, toLocal6, drop)
		frag := []expr.Any{
			&expr.Exthdr{DestRegister: 1, Type: protoFragment, Offset: 0, Len: 1, Op: expr.ExthdrOpIpv6},
			&expr.Cmp{Op: eq, Register: 1, Data: []byte{p}},
		}
		rule(v6, frag, toLocal6, drop)
	}
	rule(v6, h.member("divert6", 8, 16, true), h.member("host6", 8, 16, true), pass)
	for _, port := range []uint16{portIKE, portNATT} {
		p := binary.BigEndian.AppendUint16(nil, port)
		rule(v6, field(network, 6, eq, protoUDP), field(network, 42, eq, p...), present(network, 46, 2), toLocal6, pass)
	}
	nd := []expr.Any{
		&expr.Payload{DestRegister: 1, Base: network, Offset: 40, Len: 1},
		&expr.Range{Op: eq, Register: 1, FromData: []byte{ndFirst}, ToData: []byte{ndLast}},
	}
	rule(v6, field(network, 6, eq, protoICMPv6), field(network, 7, eq, 255), nd, pass)
	rule(v6, drop)
}

// vlanTypes are the Ethernet types of tags: IEEE 802.1Q and 802.1ad.
var vlanTypes = [][]byte{{0x81, 0x00}, {0x88, 0xa8}}

// vlanID compares the VLAN identifier of the tag at off with 0.
func vlanID(off uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: off, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0x0f, 0xff}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{0, 0}},
	}
}

// protocol compares the Ethernet type behind a tag, if there is one.
func protocol(want ...byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want}}
}

// field compares octets of the packet; without them the rule does not match.
func field(base expr.PayloadBase, off uint32, op expr.CmpOp, want ...byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: off, Len: uint32(len(want))},
		&expr.Cmp{Op: op, Register: 1, Data: want},
	}
}

// present demands that the packet has these octets.
func present(base expr.PayloadBase, off, n uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: base, Offset: off, Len: n}}
}

// member looks an address of the network header up in a set.
func (h *chain) member(set string, off, n uint32, invert bool) []expr.Any {
	s := h.set[set]
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: n},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, Invert: invert},
	}
}

func verdictExpr(k expr.VerdictKind, to string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: k, Chain: to}}
}
