package keysock

import (
	"bytes"
	"encoding/binary"
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// Every message that is refused, with the errno that answers it: a header alone.
func TestRefusals(t *testing.T) {
	r := start(t, ServerOptions{})
	x := r.stranger()
	head := func(typ pfkey.MsgType) []byte {
		return pfkey.Header{Type: typ, SAType: pfkey.SATypeESP, Seq: 21, Pid: 22}.Append(nil)
	}
	edit := func(b []byte, f func(b []byte)) []byte { f(b); return b }
	enc := func(m *pfkey.Message) []byte {
		m.Seq, m.Pid = 21, 22
		b, err := m.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	add := func(f func(m *pfkey.Message)) []byte {
		m := addMessage(0x1000)
		f(m)
		return enc(m)
	}
	getspi := func(sat pfkey.SAType, min, max uint32) []byte {
		m := addMessage(0)
		return enc(&pfkey.Message{Header: pfkey.Header{Type: pfkey.GetSPI, SAType: sat},
			Src: m.Src, Dst: m.Dst, SPIRange: &pfkey.SPIRange{Min: min, Max: max}})
	}
	var pol pfkey.Message
	if err := putPolicy(&pol, &PolicyInfo{Policy: *policy(1)}, 0); err != nil {
		t.Fatal(err)
	}
	spd := func(typ pfkey.MsgType, f func(m *pfkey.Message)) []byte {
		m, p := pol, *pol.Policy
		m.Policy = &p
		m.Type = typ
		f(&m)
		return enc(&m)
	}
	none := func(*pfkey.Message) {}
	host := binary.NativeEndian
	for _, tt := range []struct {
		name string
		in   []byte
		want syscall.Errno
	}{
		{"version 1", edit(head(pfkey.Get), func(b []byte) { b[0] = 1 }), syscall.EINVAL},
		{"type 0", edit(head(pfkey.Get), func(b []byte) { b[1] = 0 }), syscall.EINVAL},
		{"type 25", edit(head(pfkey.Get), func(b []byte) { b[1] = 25 }), syscall.EINVAL},
		{"type 255", edit(head(pfkey.Get), func(b []byte) { b[1] = 255 }), syscall.EINVAL},
		{"reserved", edit(head(pfkey.Flush), func(b []byte) { b[6] = 1 }), syscall.EINVAL},
		{"length 0", edit(head(pfkey.Get), func(b []byte) { host.PutUint16(b[4:], 0) }), syscall.EMSGSIZE},
		{"length 65535", edit(head(pfkey.Get), func(b []byte) { host.PutUint16(b[4:], 65535) }), syscall.EMSGSIZE},
		{"17 octets", append(head(pfkey.Get), 0), syscall.EMSGSIZE},
		{"cut ADD", add(none)[:64], syscall.EMSGSIZE},
		{"longer than we read", edit(append(head(pfkey.Get), make([]byte, maxMessage)...), func(b []byte) {
			host.PutUint16(b[4:], uint16(len(b)/8))
		}), syscall.EMSGSIZE},
		{"extension of length 0", edit(append(head(pfkey.Get), make([]byte, 8)...), func(b []byte) {
			host.PutUint16(b[4:], 3)
			host.PutUint16(b[18:], 1)
		}), syscall.EINVAL},
		{"bare GETSPI", head(pfkey.GetSPI), syscall.EINVAL},
		{"GETSPI of no type", getspi(0, 256, 300), syscall.EINVAL},
		{"GETSPI of type 5", getspi(5, 256, 300), syscall.EINVAL},
		{"GETSPI backwards", getspi(3, 300, 299), syscall.EINVAL},
		{"GETSPI of reserved ones", getspi(3, 0, 255), syscall.EINVAL},
		{"bare UPDATE", head(pfkey.Update), syscall.EINVAL},
		{"UPDATE of nothing", add(func(m *pfkey.Message) { m.Type = pfkey.Update }), syscall.ESRCH},
		{"bare ADD", head(pfkey.Add), syscall.EINVAL},
		{"ADD without key", add(func(m *pfkey.Message) { m.EncrKey = nil }), syscall.EINVAL},
		{"ADD with HARD alone", add(func(m *pfkey.Message) { m.Hard = &pfkey.Lifetime{} }), syscall.EINVAL},
		{"ADD of 3DES with the key of another", add(func(m *pfkey.Message) { m.SA.Encrypt = 3 }), syscall.EINVAL},
		{"ADD of Blowfish", add(func(m *pfkey.Message) { m.SA.Encrypt = 7 }), syscall.ENOSYS},
		{"ADD of 255", add(func(m *pfkey.Message) { m.SA.Encrypt = 255 }), syscall.EINVAL},
		{"bare DELETE", head(pfkey.Delete), syscall.EINVAL},
		{"DELETE of nothing", add(func(m *pfkey.Message) { m.Type = pfkey.Delete }), syscall.ESRCH},
		{"DELETE without SA", add(func(m *pfkey.Message) { m.Type, m.SA = pfkey.Delete, nil }), syscall.EINVAL},
		{"DELETE of no type", add(func(m *pfkey.Message) { m.Type, m.SAType = pfkey.Delete, 0 }), syscall.EINVAL},
		{"bare GET", head(pfkey.Get), syscall.EINVAL},
		{"GET of nothing", add(func(m *pfkey.Message) { m.Type = pfkey.Get }), syscall.ESRCH},
		{"ACQUIRE with more", add(func(m *pfkey.Message) { m.Type = pfkey.Acquire }), syscall.EOPNOTSUPP},
		{"REGISTER of type 10", edit(head(pfkey.Register), func(b []byte) { b[3] = 10 }), syscall.EINVAL},
		{"EXPIRE", head(pfkey.Expire), syscall.EOPNOTSUPP},
		{"FLUSH of type 5", edit(head(pfkey.Flush), func(b []byte) { b[3] = 5 }), syscall.EINVAL},
		{"DUMP of type 200", edit(head(pfkey.Dump), func(b []byte) { b[3] = 200 }), syscall.EINVAL},
		{"DUMP of nothing", head(pfkey.Dump), syscall.ENOENT},
		{"X_PROMISC 3", head(pfkey.XPromisc), syscall.EINVAL},
		{"X_PCHANGE", head(pfkey.XPChange), syscall.EOPNOTSUPP},
		{"bare SPDUPDATE", head(pfkey.XSPDUpdate), syscall.EINVAL},
		{"bare SPDADD", head(pfkey.XSPDAdd), syscall.EINVAL},
		{"bare SPDSETIDX", head(pfkey.XSPDSetIdx), syscall.EINVAL},
		{"SPDADD without an address", spd(pfkey.XSPDAdd, func(m *pfkey.Message) { m.Src = nil }), syscall.EINVAL},
		{"SPDADD of type 4", spd(pfkey.XSPDAdd, func(m *pfkey.Message) { m.Policy = &pfkey.Policy{Type: 4, Dir: 1} }), syscall.EINVAL},
		{"SPDADD with 7 requests", spd(pfkey.XSPDAdd, func(m *pfkey.Message) {
			q := m.Policy.Requests[0]
			m.Policy.Requests = []pfkey.Request{q, q, q, q, q, q, q}
		}), syscall.ELOOP},
		{"bare SPDDELETE", head(pfkey.XSPDDelete), syscall.EINVAL},
		{"SPDDELETE of nothing", spd(pfkey.XSPDDelete, none), syscall.ENOENT},
		{"SPDDELETE without direction", spd(pfkey.XSPDDelete, func(m *pfkey.Message) { m.Policy.Dir = 0 }), syscall.EINVAL},
		{"bare SPDGET", head(pfkey.XSPDGet), syscall.EINVAL},
		{"SPDGET of nothing", spd(pfkey.XSPDGet, none), syscall.ENOENT},
		{"X_SPDACQUIRE", head(pfkey.XSPDAcquire), syscall.EOPNOTSUPP},
		{"SPDDUMP of nothing", head(pfkey.XSPDDump), syscall.ENOENT},
		{"X_SPDEXPIRE", head(pfkey.XSPDExpire), syscall.EOPNOTSUPP},
		{"SPDDELETE2 of nothing", spd(pfkey.XSPDDelete2, none), syscall.ENOENT},
		{"bare SPDDELETE2", head(pfkey.XSPDDelete2), syscall.EINVAL},
		{"X_NAT_T_NEW_MAPPING", head(pfkey.XNATTNewMapping), syscall.EOPNOTSUPP},
		{"bare X_MIGRATE", head(pfkey.XMigrate), syscall.EINVAL},
		{"X_COMMIT of nothing", head(pfkey.XCommit), syscall.EINVAL},
		{"X_LOST", head(pfkey.XLost), syscall.EOPNOTSUPP},
	} {
		x.sendRaw(tt.in)
		m := x.recvRaw(tt.name)
		want := bytes.Clone(tt.in[:16])
		want[0], want[2], want[6], want[7] = 2, byte(tt.want), 0, 0
		host.PutUint16(want[4:], 2)
		if !bytes.Equal(m, want) {
			t.Errorf("%s: got %x (errno %d), want %x", tt.name, m, m[2], want)
		}
	}
	// Less than a header: no answer, and the connection stays. An empty datagram is
	// not its end.
	for _, n := range []int{0, 1, 15, 0} {
		x.sendRaw(make([]byte, n))
	}
	x.quiet()
}

func (x *stranger) recvRaw(name string) []byte {
	x.t.Helper()
	b := make([]byte, maxMessage)
	n, err := x.nc.Read(b)
	if err != nil {
		x.t.Fatalf("%s: %v", name, err)
	}
	return b[:n]
}

// Things that programs in the field send and that have to work.
func TestTolerance(t *testing.T) {
	r := start(t, ServerOptions{})
	x := r.stranger()
	// setkey: seq 0, KAME's flags, ports and proto 255 in addresses, state larval.
	add := addMessage(0x1000)
	add.Seq = 0
	m := x.ask(add, 0)
	if m.SA.Flags != 0 || m.Src.Addr.Port() != 0 || m.SA.Replay != 4 || m.SA.State != pfkey.StateMature {
		t.Errorf("ADD answered %v", m)
	}
	if m.Hard == nil || m.Soft == nil || m.Current == nil || m.SA2 == nil || m.SAMore != nil {
		t.Errorf("ADD answered %v", m)
	}
	// DELETE by other ports and prefixes, with SA2.
	del := &pfkey.Message{Header: pfkey.Header{Type: pfkey.Delete, SAType: 3}, SA: &pfkey.SA{SPI: 0x1000},
		SA2: &pfkey.SA2{}, Src: hostAddr(addr("192.0.2.77")), Dst: hostAddr(addr("192.0.2.2"))}
	x.ask(del, 0)
	// racoon: GETSPI without a range; setkey: with an SA extension.
	g := &pfkey.Message{Header: pfkey.Header{Type: pfkey.GetSPI, SAType: 3, Seq: 4}, SA: &pfkey.SA{}, Src: add.Src, Dst: add.Dst}
	if m = x.ask(g, 0); m.SA.SPI < 256 || m.SA.State != pfkey.StateLarval || m.Hard.AddTime != 30 {
		t.Errorf("GETSPI answered %v", m)
	}
	// OpenIKED: range from 0x100; the whole of it.
	g.SPIRange = &pfkey.SPIRange{Min: 1, Max: 0xffffffff}
	x.ask(g, 0)
	r.inServer(func() {
		l := r.b.getSPIs
		if l[0].Min != 0 || l[0].Max != 0 || l[1].Min != 256 || l[1].Max != 0xffffffff || l[0].Mode != ipsec.Transport {
			t.Errorf("backend got %+v", l)
		}
	})
	// SPDSETIDX is answered as SPDADD; SPDGET and SPDDELETE2 by id, whatever else.
	var pol pfkey.Message
	if err := putPolicy(&pol, &PolicyInfo{Policy: *policy(1)}, 0); err != nil {
		t.Fatal(err)
	}
	pol.Header = pfkey.Header{Type: pfkey.XSPDSetIdx, Seq: 5}
	x.send(&pol)
	m = x.want(pfkey.Header{Type: pfkey.XSPDAdd, Seq: 5})
	id := m.Policy.ID
	get := &pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDGet}, Policy: &pfkey.Policy{Type: 4, Dir: 9, ID: id}}
	if m = x.ask(get, 0); m.Policy.Requests[0].ReqID != 0x4001 || m.Current == nil {
		t.Errorf("SPDGET answered %v", m)
	}
	get.Type = pfkey.XSPDDelete2
	x.ask(get, 0)
	// ACQUIRE failure reports have no answer.
	for _, h := range []pfkey.Header{
		{Type: pfkey.Acquire, SAType: 3, Seq: 66, Errno: 110}, {Type: pfkey.Acquire, SAType: 3, Errno: 110},
		{Type: pfkey.Acquire, SAType: 3, Seq: 67},
	} {
		x.send(&pfkey.Message{Header: h})
	}
	x.quiet()
	r.inServer(func() {
		if len(r.b.failed) != 1 || r.b.failed[0] != 66 {
			t.Errorf("AcquireFailed: got %v, want 66 alone", r.b.failed)
		}
	})
}

// Ports of ICMP policies survive, 0 included.
func TestICMPPolicies(t *testing.T) {
	r := start(t, ServerOptions{})
	c, ctx := r.dial(), r.ctx()
	for n, typ := range []uint16{0, 1, 9, 256} {
		p := policy(byte(n))
		p.Sel.Proto, p.Sel.SrcPort, p.Sel.DstPort = 1, typ, 1
		got, err := c.AddPolicy(ctx, p)
		if err != nil || got.Sel != p.Sel {
			t.Errorf("AddPolicy: got %+v, %v, want %+v", got, err, p.Sel)
		}
		wantErr(t, "DeletePolicy", c.DeletePolicy(ctx, p.Dir, p.Sel), nil)
	}
}
