package keysock

import (
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

var epoch = time.Unix(1700000000, 0)

// fakeBackend is an engine that is a table. It is used by one goroutine.
type fakeBackend struct {
	undo     map[uint64][]*SAInfo // the SAs before a transaction
	sas      []*SAInfo
	policies []*PolicyInfo
	drafts   map[uint64][]*PolicyInfo
	nextID   uint32
	nextSPI  ipsec.SPI
	failed   []uint32 // seqs of AcquireFailed
	aborted  []uint64
	addrs    []netip.Prefix
	status   []byte
	getSPIs  []GetSPI

	registered func(conn uint64)

	migrated   []*Migration
	migrateErr error

	at int // where Get found the last one: a dump wants the next
}

func newFake() *fakeBackend {
	return &fakeBackend{drafts: map[uint64][]*PolicyInfo{}, nextSPI: 0x1000, status: []byte(`{"ok":true}`)}
}

func clone(i *SAInfo) *SAInfo {
	j := *i
	j.EncrKey, j.AuthKey = i.EncrKey.Clone(), i.AuthKey.Clone()
	return &j
}

func (f *fakeBackend) Supported() Supported {
	return Supported{Encr: alg.AllEncr(), Auth: alg.AllInteg(), Queues: 3}
}

func (f *fakeBackend) find(id ipsec.SAID) int {
	return slices.IndexFunc(f.sas, func(i *SAInfo) bool { return i.SAID == id })
}

func (f *fakeBackend) GetSPI(g GetSPI) (*SAInfo, error) {
	f.getSPIs = append(f.getSPIs, g)
	spi := g.Min
	if spi == 0 {
		f.nextSPI++
		spi = f.nextSPI
	}
	i := &SAInfo{Seq: g.Seq, Added: epoch}
	i.SAID, i.Src, i.Mode, i.ReqID = ipsec.SAID{Proto: g.Proto, Dst: g.Dst, SPI: spi}, g.Src, g.Mode, g.ReqID
	if f.find(i.SAID) >= 0 {
		return nil, syscall.EEXIST
	}
	i.Soft.AddTime, i.Hard.AddTime = 30*time.Second, 30*time.Second
	f.sas = append(f.sas, i)
	return i, nil
}

func (f *fakeBackend) Add(p *ipsec.SAParams, seq uint32) (*SAInfo, error) {
	if f.find(p.SAID) >= 0 {
		return nil, syscall.EEXIST
	}
	i := &SAInfo{SAParams: *p, State: Mature, Seq: seq, Added: epoch}
	f.sas = append(f.sas, i)
	return i, nil
}

func (f *fakeBackend) Update(p *ipsec.SAParams, seq uint32) (*SAInfo, error) {
	k := f.find(p.SAID)
	if k < 0 {
		return nil, syscall.ESRCH
	}
	f.sas[k] = &SAInfo{SAParams: *p, State: Mature, Seq: seq, Added: epoch, Packets: 1 << 33, Bytes: 1 << 40, FirstUsed: epoch.Add(time.Second)}
	return f.sas[k], nil
}

func (f *fakeBackend) Delete(id ipsec.SAID, _ netip.Addr) (*SAInfo, error) {
	k := f.find(id)
	if k < 0 {
		return nil, syscall.ESRCH
	}
	i := f.sas[k]
	f.sas = slices.Delete(f.sas, k, k+1)
	return i, nil
}

// StageSA works at once; Abort takes it back.
func (f *fakeBackend) StageSA(conn uint64, c SAChange) (*SAInfo, error) {
	if f.undo == nil {
		f.undo = map[uint64][]*SAInfo{}
	}
	if _, ok := f.undo[conn]; !ok {
		f.undo[conn] = slices.Clone(f.sas)
	}
	switch c.Verb {
	case SAAdd:
		return f.Add(c.P, 0)
	case SAUpdate:
		return f.Update(c.P, 0)
	}
	return f.Delete(c.P.SAID, netip.Addr{})
}

func (f *fakeBackend) Get(id ipsec.SAID, _ netip.Addr) (*SAInfo, error) {
	if f.at++; f.at >= len(f.sas) || f.sas[f.at].SAID != id {
		if f.at = f.find(id); f.at < 0 {
			return nil, syscall.ESRCH
		}
	}
	return clone(f.sas[f.at]), nil
}

func (f *fakeBackend) Flush(proto ipsec.Protocol) bool {
	n := len(f.sas)
	f.sas = slices.DeleteFunc(f.sas, func(i *SAInfo) bool { return proto == 0 || i.Proto == proto })
	return len(f.sas) != n
}

func (f *fakeBackend) SAIDs(proto ipsec.Protocol) []ipsec.SAID {
	var l []ipsec.SAID
	for _, i := range f.sas {
		if proto == 0 || i.Proto == proto {
			l = append(l, i.SAID)
		}
	}
	return l
}

func (f *fakeBackend) AcquireFailed(seq uint32, _ syscall.Errno) { f.failed = append(f.failed, seq) }

// spd returns the list that conn works on, and what puts a changed one back.
func (f *fakeBackend) spd(conn uint64) ([]*PolicyInfo, func([]*PolicyInfo)) {
	if d, ok := f.drafts[conn]; ok {
		return d, func(l []*PolicyInfo) { f.drafts[conn] = l }
	}
	return f.policies, func(l []*PolicyInfo) { f.policies = l }
}

func (f *fakeBackend) AddPolicy(conn uint64, p *ipsec.Policy) (*PolicyInfo, error) {
	l, set := f.spd(conn)
	if slices.ContainsFunc(l, func(i *PolicyInfo) bool { return i.Dir == p.Dir && i.Sel == p.Sel }) {
		return nil, syscall.EEXIST
	}
	f.nextID++
	i := &PolicyInfo{Policy: *p, Added: epoch}
	i.ID = f.nextID
	i.Requests = slices.Clone(p.Requests)
	for k := range i.Requests {
		if r := &i.Requests[k]; r.Level == ipsec.LevelUnique && r.ReqID == 0 {
			r.ReqID = 0x4000 + ipsec.ReqID(i.ID)
		}
	}
	set(append(slices.Clone(l), i))
	return i, nil
}

func (f *fakeBackend) UpdatePolicy(conn uint64, p *ipsec.Policy) (*PolicyInfo, error) {
	l, set := f.spd(conn)
	for k, i := range l {
		if i.Dir == p.Dir && i.Sel == p.Sel {
			n := &PolicyInfo{Policy: *p, Added: epoch}
			n.ID = i.ID
			l = slices.Clone(l)
			l[k] = n
			set(l)
			return n, nil
		}
	}
	return f.AddPolicy(conn, p)
}

func (f *fakeBackend) remove(conn uint64, want func(*PolicyInfo) bool) (*PolicyInfo, error) {
	l, set := f.spd(conn)
	for k, i := range l {
		if want(i) {
			set(slices.Delete(slices.Clone(l), k, k+1))
			return i, nil
		}
	}
	return nil, syscall.ENOENT
}

func (f *fakeBackend) DeletePolicy(conn uint64, dir ipsec.Direction, sel ipsec.Selector) (*PolicyInfo, error) {
	return f.remove(conn, func(i *PolicyInfo) bool { return i.Dir == dir && i.Sel == sel })
}

func (f *fakeBackend) DeletePolicyID(conn uint64, id uint32) (*PolicyInfo, error) {
	return f.remove(conn, func(i *PolicyInfo) bool { return i.ID == id })
}

func (f *fakeBackend) GetPolicy(conn uint64, id uint32) (*PolicyInfo, error) {
	l, _ := f.spd(conn)
	for _, i := range l {
		if i.ID == id {
			return i, nil
		}
	}
	return nil, syscall.ENOENT
}

func (f *fakeBackend) Policies(conn uint64) []*PolicyInfo {
	l, _ := f.spd(conn)
	return slices.Clone(l)
}

func (f *fakeBackend) FlushPolicies(conn uint64) bool {
	l, set := f.spd(conn)
	set(nil)
	return len(l) > 0
}

func (f *fakeBackend) Migrate(m *Migration) error {
	f.migrated = append(f.migrated, m)
	return f.migrateErr
}

func (f *fakeBackend) Begin(conn uint64) error {
	f.drafts[conn] = slices.Clone(f.policies)
	return nil
}

func (f *fakeBackend) Commit(conn uint64) error {
	delete(f.undo, conn)
	f.policies = f.drafts[conn]
	delete(f.drafts, conn)
	return nil
}

func (f *fakeBackend) Abort(conn uint64) error {
	if was, ok := f.undo[conn]; ok {
		f.sas = was
		delete(f.undo, conn)
	}
	delete(f.drafts, conn)
	f.aborted = append(f.aborted, conn)
	return nil
}

func (f *fakeBackend) Status() ([]byte, error) { return f.status, nil }

func (f *fakeBackend) Move(id ipsec.SAID, p *ipsec.SAParams) (*SAInfo, error) {
	k := f.find(id)
	if k < 0 {
		return nil, syscall.ESRCH
	}
	i := *f.sas[k]
	i.SAParams = *p
	f.sas[k] = &i
	return &i, nil
}

func (f *fakeBackend) AddAddress(p netip.Prefix) error {
	f.addrs = append(f.addrs, p)
	return nil
}

func (f *fakeBackend) DeleteAddress(p netip.Prefix) error {
	i := slices.Index(f.addrs, p)
	if i < 0 {
		return syscall.ENOENT
	}
	f.addrs = slices.Delete(f.addrs, i, i+1)
	return nil
}

func (f *fakeBackend) Registered(conn uint64) {
	if f.registered != nil {
		f.registered(conn)
	}
}
