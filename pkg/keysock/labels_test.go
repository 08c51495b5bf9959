package keysock

import (
	"net"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

func label(s string) *pfkey.SecCtx { return &pfkey.SecCtx{Alg: 1, DOI: 1, Ctx: []byte(s)} }

func wantLabel(t *testing.T, what string, m *pfkey.Message, want string) {
	t.Helper()
	var w *pfkey.SecCtx
	if want != "" {
		w = label(want)
	}
	if !reflect.DeepEqual(m.SecCtx, w) {
		t.Errorf("%s: security context: got %+v, want %+v", what, m.SecCtx, w)
	}
}

func TestSALabels(t *testing.T) {
	r := start(t, ServerOptions{})
	x := r.stranger()
	head := func(typ pfkey.MsgType) pfkey.Header {
		return pfkey.Header{Type: typ, SAType: pfkey.SATypeESP, Seq: 5, Pid: 6}
	}
	req := func(typ pfkey.MsgType, l *pfkey.SecCtx) *pfkey.Message {
		m := addMessage(0x1000)
		m.Header, m.SecCtx = head(typ), l
		return m
	}
	wantLabel(t, "ADD", x.ask(req(pfkey.Add, label("one")), 0), "one")
	wantLabel(t, "GET", x.ask(req(pfkey.Get, nil), 0), "one")
	x.send(&pfkey.Message{Header: head(pfkey.Dump)})
	wantLabel(t, "DUMP", x.recv(), "one")
	wantLabel(t, "UPDATE without", x.ask(req(pfkey.Update, nil), 0), "one")
	wantLabel(t, "UPDATE", x.ask(req(pfkey.Update, label("two")), 0), "two")
	wantLabel(t, "GET", x.ask(req(pfkey.Get, nil), 0), "two")
	x.ask(req(pfkey.Add, label("three")), uint8(syscall.EEXIST))
	wantLabel(t, "DELETE", x.ask(req(pfkey.Delete, nil), 0), "two")
	wantLabel(t, "ADD of a successor", x.ask(req(pfkey.Add, nil), 0), "")
	x.ask(req(pfkey.Delete, nil), 0)

	// A larval successor has none either.
	x.ask(req(pfkey.Add, label("four")), 0)
	x.ask(req(pfkey.Delete, nil), 0)
	g := req(pfkey.GetSPI, nil)
	g.SPIRange = &pfkey.SPIRange{Min: 0x1000, Max: 0x1000}
	wantLabel(t, "GETSPI", x.ask(g, 0), "")
	wantLabel(t, "GET of a larval SA", x.ask(req(pfkey.Get, nil), 0), "")
}

func TestPolicyLabels(t *testing.T) {
	r := start(t, ServerOptions{})
	x, y := r.stranger(), r.stranger()
	req := func(typ pfkey.MsgType, l *pfkey.SecCtx) *pfkey.Message {
		m := &pfkey.Message{}
		if err := putPolicy(m, &PolicyInfo{Policy: *policy(1)}, 0); err != nil {
			t.Fatal(err)
		}
		m.Header, m.SecCtx = pfkey.Header{Type: typ, Seq: 5, Pid: 6}, l
		return m
	}
	m := x.ask(req(pfkey.XSPDAdd, label("one")), 0)
	wantLabel(t, "SPDADD", m, "one")
	wantLabel(t, "copy of SPDADD", y.recv(), "one")
	get := req(pfkey.XSPDGet, nil)
	get.Policy.ID = m.Policy.ID
	wantLabel(t, "SPDGET", x.ask(get, 0), "one")
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDDump}})
	wantLabel(t, "SPDDUMP", x.recv(), "one")
	wantLabel(t, "SPDUPDATE", x.ask(req(pfkey.XSPDUpdate, label("two")), 0), "two")
	wantLabel(t, "SPDGET", x.ask(get, 0), "two")

	begin := func() { x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XBegin}}, 0) }
	begin()
	wantLabel(t, "SPDUPDATE in a transaction", x.ask(req(pfkey.XSPDUpdate, label("three")), 0), "three")
	x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XAbort}}, 0)
	wantLabel(t, "SPDGET after it was aborted", x.ask(get, 0), "two")
	begin()
	x.ask(req(pfkey.XSPDUpdate, label("four")), 0)
	x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XCommit}}, 0)
	wantLabel(t, "SPDGET after it was committed", x.ask(get, 0), "four")
	wantLabel(t, "SPDUPDATE without", x.ask(req(pfkey.XSPDUpdate, nil), 0), "")
	wantLabel(t, "SPDGET", x.ask(get, 0), "")
}

// Labels of what has gone do not pile up, and follow what has moved.
func TestLabelsSwept(t *testing.T) {
	r := start(t, ServerOptions{})
	x := r.stranger()
	for k := range minSweep + 10 {
		m := addMessage(0x1000 + uint32(k))
		m.SecCtx = label("one")
		x.ask(m, 0)
		if k%2 == 0 {
			m.Type, m.SecCtx = pfkey.Delete, nil
			x.ask(m, 0)
		}
	}
	r.inServer(func() {
		if got := len(r.s.labels.sas); got > minSweep/2+20 {
			t.Errorf("%d labels, want half of %d", got, minSweep)
		}
		from := ipsec.SAID{Proto: ipsec.ESP, Dst: addr("192.0.2.2"), SPI: 0x1001}
		to := from
		to.Dst = addr("203.0.113.7")
		r.b.sas[r.b.find(from)].Dst = to.Dst
		n := len(r.s.labels.sas)
		r.s.moveLabels(&Migration{Moves: []Move{{Proto: ipsec.ESP, OldDst: from.Dst, NewDst: to.Dst}}})
		if r.s.labels.sas[from] != nil || r.s.labels.sas[to] == nil || len(r.s.labels.sas) != n {
			t.Error("the label has not moved with its SA")
		}
	})
}

// Extensions that mean nothing here are taken and forgotten, malformed ones are
// refused with the message.
func TestIgnoredExtensions(t *testing.T) {
	r := start(t, ServerOptions{})
	x := r.stranger()
	for k, tt := range []struct {
		name string
		set  func(m *pfkey.Message)
	}{
		{"IDENTITY", func(m *pfkey.Message) {
			m.IdentSrc = &pfkey.Identity{Type: pfkey.IdentFQDN, Name: "gateway.example"}
			m.IdentDst = &pfkey.Identity{Type: pfkey.IdentUserFQDN, ID: 1000, Name: "user@host.example"}
		}},
		{"IDENTITY without a name", func(m *pfkey.Message) { m.IdentSrc = &pfkey.Identity{Type: pfkey.IdentPrefix} }},
		{"SENSITIVITY", func(m *pfkey.Message) {
			m.Sensitivity = &pfkey.Sensitivity{Domain: 1, SensLevel: 2, SensBitmap: []uint64{3}, IntegBitmap: []uint64{4, 5}}
		}},
		{"PROXY", func(m *pfkey.Message) { m.Proxy = hostAddr(addr("10.0.0.1")) }},
		{"PROXY of another family", func(m *pfkey.Message) { m.Proxy = hostAddr(addr("2001:db8::1")) }},
		{"KMADDRESS", func(m *pfkey.Message) {
			a := m.Src.Addr
			m.KMAddress = &pfkey.KMAddress{Local: a, Remote: a}
		}},
		{"KMPRIVATE", func(m *pfkey.Message) { m.KMPrivate = &pfkey.KMPrivate{} }},
		{"FILTER", func(m *pfkey.Message) { m.Filter = &pfkey.Filter{} }},
		{"SPIRANGE", func(m *pfkey.Message) { m.SPIRange = &pfkey.SPIRange{Min: 9, Max: 8} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := addMessage(0x1000 + uint32(k))
			tt.set(m)
			a := x.ask(m, 0)
			m.Type = pfkey.Get
			b := x.ask(m, 0)
			for _, m := range []*pfkey.Message{a, b} {
				if m.IdentSrc != nil || m.IdentDst != nil || m.Sensitivity != nil || m.Proxy != nil || m.KMAddress != nil ||
					m.KMPrivate != nil || m.Filter != nil || m.SPIRange != nil {
					t.Errorf("given back: %v", m)
				}
			}
		})
	}
}

func TestAbstractName(t *testing.T) {
	name := "@missiu-test-" + filepath.Base(t.TempDir()) + filepath.Base(tempDir(t))
	r := start(t, ServerOptions{Abstract: name})
	c, err := Dial(r.ctx(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wantErr(t, "Add by the abstract name", c.Add(r.ctx(), params(0x1000), 0), nil)
	_, err = r.dial().Get(r.ctx(), params(0x1000).SAID, addr("192.0.2.1"))
	wantErr(t, "Get by the file", err, nil)

	// The name is taken: no second server, and nothing of it stays.
	path := filepath.Join(tempDir(t), "eth1.pfkey")
	_, err = NewServer(path, newFake(), ServerOptions{Abstract: name})
	wantErr(t, "second server", err, syscall.EADDRINUSE)
	if Alive(seqpacket, path) {
		t.Error("the second server listens")
	}
	for _, bad := range []string{"missiu", "@"} {
		if _, err := NewServer(path, newFake(), ServerOptions{Abstract: bad}); err == nil {
			t.Errorf("abstract name %q: got no error", bad)
		}
	}
	r.stop()
	if nc, err := net.Dial("unixpacket", name); err == nil {
		nc.Close()
		t.Error("the name is there after Serve")
	}
	s, err := NewServer(path, newFake(), ServerOptions{Abstract: name})
	wantErr(t, "name after Serve", err, nil)
	s.Close()
}
