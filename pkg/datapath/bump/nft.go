package bump

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// The table of an interface, made of raw messages: the library that package wire
// uses knows neither flags of tables nor the statement fwd.
//
//	table netdev missiu-bump-<if> {
//	    flags owner, persist                 # owner alone with FailOpen
//	    chain rx { type filter hook ingress device <if> priority -500
//	        meta mark IN meta mark set 0 accept
//	        meta mark set 0 fwd to KX }      # low Active
//	    chain tx { type filter hook egress device <if> priority -500
//	        meta mark OUT accept             # guard looks at it too
//	        meta mark set STACK fwd to KX }  # high Active
//	    chain ux { type filter hook ingress device KU priority -500; drop }
//	    chain kx { type filter hook ingress device KX priority -500; drop }
//	}
//	table inet missiu-bump-<if> {            # the same flags
//	    chain in  { type filter hook prerouting priority -500
//	        iifname <if> iif != INDEX drop }     # low Active
//	    chain out { type filter hook postrouting priority 500
//	        oifname <if> oif != INDEX drop }     # high Active
//	}
//
// fwd takes a frame away from its way: what a side's reader gets nobody else
// does, so a change of state, which is one transaction, neither loses frames nor
// doubles them. Chains have the policy accept, because a base chain is in the path a
// moment before its rules are.
//
// The kernel binds chains to names of devices: since Linux 6.16 one that is made
// anew gets its chains with its name, and one that is renamed loses them until
// we hear of it; guard holds meanwhile. (Chains at all devices, of Linux 6.18, would
// know it by its index, but the nft of the years before hangs when it lists them.)
// The table of family inet is for the kernels before: IP packets have no business with an interface of
// that name that is not the one we know.
//
// Chain kx gets what somebody's deletion of the redirection leaves there.
type table struct {
	c     *netlink.Conn // the owner; the kernel acts when it is closed
	pid   uint32        // netlink's, of c
	name  string
	fate  []uint32 // flags of the table, the best first
	flag  uint32   // those in use, once fated
	fated bool
	named bool // the kernel has tables of family inet, or may have

	// Marks: of frames that we hand to the kernel, of those that we send, and, at
	// KU, of what the kernel sends. All are random.
	in, out, stack uint32
}

// Flags of tables. persist is of Linux 6.9, owner of 5.12.
const (
	tableOwner   = 2
	tablePersist = 4
)

// tableName makes an identifier of nft's language of an interface name;
// different names stay different.
func tableName(ifname string) string {
	var b strings.Builder
	b.WriteString("missiu-bump-")
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

func openTable(ifname string, failOpen bool) (*table, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("%w: %w", ErrNoEgress, err)
	}
	if err != nil {
		return nil, nftError(err)
	}
	t := &table{c: c, name: tableName(ifname), fate: []uint32{tableOwner | tablePersist, 0}, named: true}
	if failOpen {
		t.fate = []uint32{tableOwner}
	}
	for t.in == t.out || t.in == t.stack || t.out == t.stack || t.in == 0 || t.out == 0 || t.stack == 0 {
		t.in, t.out, t.stack = randomMark(), randomMark(), randomMark()
	}
	if t.pid, err = portID(c); err != nil {
		c.Close()
		return nil, err
	}
	return t, nil
}

func randomMark() uint32 {
	var b [4]byte
	rand.Read(b[:])
	return binary.NativeEndian.Uint32(b[:])
}

// portID is the number that the kernel names a connection by in its events.
func portID(c *netlink.Conn) (pid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var name unix.Sockaddr
	e := raw.Control(func(fd uintptr) { name, err = unix.Getsockname(int(fd)) })
	if a, ok := name.(*unix.SockaddrNetlink); ok {
		pid = a.Pid
	}
	return pid, errors.Join(e, err)
}

func nftError(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, os.ErrPermission) {
		return &tap.PrivilegeError{Op: "nftables", Capability: "CAP_NET_ADMIN", Err: unix.EPERM}
	}
	return fmt.Errorf("nftables: %w", err)
}

// plan is what the table is to hold.
type plan struct {
	device    string // the interface
	index     int    // its index
	kx, ku    string
	kxIndex   int
	high, low State
}

// apply makes the table what p says, whatever it was, in one transaction.
func (t *table) apply(p *plan) error {
	if t.fated {
		return t.commit(t.messages(p, t.flag))
	}
	var err error
	for _, t.named = range []bool{true, false} {
		for _, f := range t.fate {
			if err = t.commit(t.messages(p, f)); err == nil {
				// Without chains the kernel has not said whether it can have them.
				t.flag, t.fated = f, p.high == Active || p.low == Active
				return nil
			}
			if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EAFNOSUPPORT) {
				return err
			}
		}
	}
	return err
}

// owned: nobody else can take the table away while we live.
func (t *table) owned() bool { return t.flag&tableOwner != 0 }

func (t *table) messages(p *plan, flags uint32) *batch {
	b := &batch{table: t.name, family: unix.NFPROTO_NETDEV}
	anew := func() {
		// So the table may exist or not.
		b.newTable(nil)
		b.delTable()
		b.newTable(&flags)
	}
	anew()
	if t.named {
		b.family = unix.NFPROTO_INET
		anew()
		if p.low == Active {
			b.base("in", unix.NF_INET_PRE_ROUTING, -500, "")
			b.rule("in", deviceIsNot(unix.NFT_META_IIFNAME, p.device, unix.NFT_META_IIF, p.index), drop)
		}
		if p.high == Active {
			b.base("out", unix.NF_INET_POST_ROUTING, 500, "")
			b.rule("out", deviceIsNot(unix.NFT_META_OIFNAME, p.device, unix.NFT_META_OIF, p.index), drop)
		}
		b.family = unix.NFPROTO_NETDEV
	}
	if p.high != Active && p.low != Active {
		return b
	}
	b.base("ux", unix.NF_NETDEV_INGRESS, -500, p.ku)
	b.base("kx", unix.NF_NETDEV_INGRESS, -500, p.kx)
	b.base("rx", unix.NF_NETDEV_INGRESS, -500, p.device)
	b.base("tx", unix.NF_NETDEV_EGRESS, -500, p.device)
	b.rule("ux", drop)
	b.rule("kx", drop)
	b.rule("rx", markIs(t.in), setMark(0), accept)
	b.rule("tx", markIs(t.out), accept)
	if p.low == Active {
		b.rule("rx", setMark(0), fwd(p.kxIndex))
	}
	if p.high == Active {
		b.rule("tx", setMark(t.stack), fwd(p.kxIndex))
	}
	return b
}

// batch is a transaction in the making.
type batch struct {
	table  string
	family uint8
	msgs   []netlink.Message
	err    error
}

func (b *batch) add(kind int, flags netlink.HeaderFlags, attrs func(*netlink.AttributeEncoder)) {
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	attrs(e)
	data, err := e.Encode()
	b.err = errors.Join(b.err, err)
	b.msgs = append(b.msgs, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: netlink.Request | netlink.Acknowledge | flags},
		Data:   append([]byte{b.family, unix.NFNETLINK_V0, 0, 0}, data...),
	})
}

// base adds a chain; device is "" where the family has its hooks at none.
func (b *batch) base(name string, hook uint32, priority int32, device string) {
	b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_CHAIN_TABLE, b.table)
		e.String(unix.NFTA_CHAIN_NAME, name)
		e.Nested(unix.NFTA_CHAIN_HOOK, func(e *netlink.AttributeEncoder) error {
			e.ByteOrder = binary.BigEndian
			e.Uint32(unix.NFTA_HOOK_HOOKNUM, hook)
			e.Int32(unix.NFTA_HOOK_PRIORITY, priority)
			if device != "" {
				e.String(unix.NFTA_HOOK_DEV, device)
			}
			return nil
		})
		e.Uint32(unix.NFTA_CHAIN_POLICY, 1) // accept
		e.String(unix.NFTA_CHAIN_TYPE, "filter")
	})
}

// newTable adds the table, or lets one that is there be if flags is nil.
func (b *batch) newTable(flags *uint32) {
	b.add(unix.NFT_MSG_NEWTABLE, netlink.Create, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_TABLE_NAME, b.table)
		if flags != nil {
			e.Uint32(unix.NFTA_TABLE_FLAGS, *flags)
		}
	})
}

func (b *batch) delTable() {
	b.add(unix.NFT_MSG_DELTABLE, 0, func(e *netlink.AttributeEncoder) { e.String(unix.NFTA_TABLE_NAME, b.table) })
}

// exprs of a rule, in order.
type exprs func(*netlink.AttributeEncoder)

func (b *batch) rule(chain string, parts ...exprs) {
	b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, func(e *netlink.AttributeEncoder) {
		e.String(unix.NFTA_RULE_TABLE, b.table)
		e.String(unix.NFTA_RULE_CHAIN, chain)
		e.Nested(unix.NFTA_RULE_EXPRESSIONS, func(e *netlink.AttributeEncoder) error {
			for _, p := range parts {
				p(e)
			}
			return nil
		})
	})
}

// expression appends one to a list.
func expression(e *netlink.AttributeEncoder, name string, data func(*netlink.AttributeEncoder)) {
	e.Nested(unix.NFTA_LIST_ELEM, func(e *netlink.AttributeEncoder) error {
		e.String(unix.NFTA_EXPR_NAME, name)
		e.Nested(unix.NFTA_EXPR_DATA, func(e *netlink.AttributeEncoder) error {
			e.ByteOrder = binary.BigEndian
			data(e)
			return nil
		})
		return nil
	})
}

const reg = unix.NFT_REG_1

// immediate loads a number as the kernel holds it, in the byte order of the machine.
func immediate(e *netlink.AttributeEncoder, v uint32) {
	expression(e, "immediate", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_IMMEDIATE_DREG, reg)
		e.Nested(unix.NFTA_IMMEDIATE_DATA, func(e *netlink.AttributeEncoder) error {
			e.Bytes(unix.NFTA_DATA_VALUE, nlenc.Uint32Bytes(v))
			return nil
		})
	})
}

// meta compares what the kernel keeps beside a packet.
func meta(e *netlink.AttributeEncoder, key, op uint32, v []byte) {
	expression(e, "meta", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_META_KEY, key)
		e.Uint32(unix.NFTA_META_DREG, reg)
	})
	expression(e, "cmp", func(e *netlink.AttributeEncoder) {
		e.Uint32(unix.NFTA_CMP_SREG, reg)
		e.Uint32(unix.NFTA_CMP_OP, op)
		e.Nested(unix.NFTA_CMP_DATA, func(e *netlink.AttributeEncoder) error {
			e.Bytes(unix.NFTA_DATA_VALUE, v)
			return nil
		})
	})
}

func markIs(v uint32) exprs {
	return func(e *netlink.AttributeEncoder) { meta(e, unix.NFT_META_MARK, unix.NFT_CMP_EQ, nlenc.Uint32Bytes(v)) }
}

// deviceIsNot: it has the name, and another index.
func deviceIsNot(nameKey uint32, name string, indexKey uint32, index int) exprs {
	return func(e *netlink.AttributeEncoder) {
		padded := make([]byte, unix.IFNAMSIZ)
		copy(padded, name)
		meta(e, nameKey, unix.NFT_CMP_EQ, padded)
		meta(e, indexKey, unix.NFT_CMP_NEQ, nlenc.Uint32Bytes(uint32(index)))
	}
}

func setMark(v uint32) exprs {
	return func(e *netlink.AttributeEncoder) {
		immediate(e, v)
		expression(e, "meta", func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_META_KEY, unix.NFT_META_MARK)
			e.Uint32(unix.NFTA_META_SREG, reg)
		})
	}
}

func fwd(index int) exprs {
	return func(e *netlink.AttributeEncoder) {
		immediate(e, uint32(index))
		expression(e, "fwd", func(e *netlink.AttributeEncoder) { e.Uint32(unix.NFTA_FWD_SREG_DEV, reg) })
	}
}

func verdict(v uint32) exprs {
	return func(e *netlink.AttributeEncoder) {
		expression(e, "immediate", func(e *netlink.AttributeEncoder) {
			e.Uint32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
			e.Nested(unix.NFTA_IMMEDIATE_DATA, func(e *netlink.AttributeEncoder) error {
				e.Nested(unix.NFTA_DATA_VERDICT, func(e *netlink.AttributeEncoder) error {
					e.ByteOrder = binary.BigEndian
					e.Uint32(unix.NFTA_VERDICT_CODE, v)
					return nil
				})
				return nil
			})
		})
	}
}

var (
	drop   = verdict(0)
	accept = verdict(1)
)

// replyTimeout is how long the kernel's answers to a transaction may take; it
// gives them before it returns from the send.
const replyTimeout = 5 * time.Second

// commit sends a transaction. An error means that nothing of it is in force.
func (t *table) commit(b *batch) error {
	if b.err != nil {
		return b.err
	}
	frame := func(kind int) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request},
			Data:   []byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES},
		}
	}
	msgs := append([]netlink.Message{frame(unix.NFNL_MSG_BATCH_BEGIN)}, b.msgs...)
	msgs = append(msgs, frame(unix.NFNL_MSG_BATCH_END))
	sent, err := t.c.SendMessages(msgs)
	if err != nil {
		return nftError(err)
	}
	last := sent[len(sent)-2].Header.Sequence
	t.c.SetReadDeadline(time.Now().Add(replyTimeout))
	defer t.c.SetReadDeadline(time.Time{})
	var first error
	for {
		replies, err := t.c.Receive()
		switch {
		case err == nil:
			for _, m := range replies {
				if m.Header.Sequence == last {
					return first
				}
			}
		case first != nil && errors.Is(err, os.ErrDeadlineExceeded):
			return first
		case first == nil:
			first = nftError(err)
			// Answers to the rest, if there are any, are here already.
			t.c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		}
		if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			return first
		}
	}
}

// families of the tables.
var families = [...]uint8{unix.NFPROTO_NETDEV, unix.NFPROTO_INET}

// exists tells whether there is a table of this name, and whether all are there
// that apply makes.
func (t *table) exists() (is, all bool, err error) {
	all = true
	for _, family := range families {
		have, err := t.has(family)
		if err != nil {
			return false, false, err
		}
		is = is || have
		all = all && (have || family == unix.NFPROTO_INET && !t.named)
	}
	return is, all, nil
}

func (t *table) has(family uint8) (bool, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.NFTA_TABLE_NAME, t.name)
	data, err := e.Encode()
	if err != nil {
		return false, err
	}
	_, err = t.c.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETTABLE), Flags: netlink.Request},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...),
	})
	// A kernel without the packet filter says EINVAL, if it knows of netfilter at all.
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil {
		err = nftError(err)
	}
	return err == nil, err
}

// remove deletes the tables; those that are not there are no error.
func (t *table) remove() error {
	var errs []error
	for _, family := range families {
		b := &batch{table: t.name, family: family}
		b.delTable()
		if err := t.commit(b); !errors.Is(err, unix.ENOENT) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// egressHook is NF_NETDEV_EGRESS. Tests change it to a number that no kernel has,
// since one without the hook gives the same answer.
var egressHook uint32 = unix.NF_NETDEV_EGRESS

// probe finds out whether the kernel can take what leaves an interface. It makes
// nothing.
func (t *table) probe(device string) error {
	b := &batch{table: t.name + "-probe", family: unix.NFPROTO_NETDEV}
	b.newTable(nil)
	b.base("tx", egressHook, -500, device)
	b.delTable()
	err := t.commit(b)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", ErrNoEgress, err)
	}
	return err
}
