package ike

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"github.com/missiu/missiu/proto/ikev2"
)

// What a new configuration changes it changes for whom it concerns: of two peers
// one loses its SAs, the other hears nothing, and is probed by its new interval.
func TestReloadTouchesWhatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		addrC := netip.MustParseAddr("192.0.2.3")
		n := &network{}
		rules := func(keyC string, dpd time.Duration) *pad.DB {
			rb, rc := pad.NewRule("b"), pad.NewRule("c")
			rb.Remote, rb.PSK, rb.DPD = []pad.Range{pad.One(addrB)}, keys("b"), dpd
			rc.Remote, rc.PSK = []pad.Range{pad.One(addrC)}, keys(keyC)
			db, err := pad.NewDB([]*pad.Rule{rb, rc})
			if err != nil {
				t.Fatal(err)
			}
			return db
		}
		a := newNode(t, n, addrA, addrB, "x", func(c *Config, m *missiu) {
			c.Rules = rules("c", 0)
			more := policies(addrA, addrC)
			more[0].ID, more[1].ID = 3, 4
			m.policies = append(m.policies, more...)
		})
		b, c := newNode(t, n, addrB, addrA, "b"), newNode(t, n, addrC, addrA, "c")
		for _, rule := range []string{"b", "c"} {
			if err := a.Up(t.Context(), rule); err != nil {
				t.Fatal(err)
			}
		}
		was := spiSet(b.m)
		mark := len(n.packets())
		a.Reload(t.Context(), rules("another", 30*time.Second), Limits{})
		synctest.Wait()
		if got := spiSet(b.m); !slices.Equal(got, was) || len(got) != 2 {
			t.Errorf("SAs of the rule that is the same: %v, were %v", got, was)
		}
		if got := spiSet(c.m); len(got) != 0 {
			t.Errorf("SAs of the rule with another key: %v", got)
		}
		for _, p := range n.packets()[mark:] {
			if p.to.Addr() == addrB || p.from.Addr() == addrB {
				t.Errorf("a message from %v to %v", p.from, p.to)
			}
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if !slices.ContainsFunc(n.packets()[mark:], func(p packet) bool { return p.to.Addr() == addrB }) {
			t.Error("no probe by the new interval")
		}
		for _, x := range []*node{a, b, c} {
			x.stop(t)
		}
	})
}

// The configuration changes while IKE_AUTH is on its way, of either side and at each
// of its messages: what was begun by rules that are no more does not stay.
func TestReloadDuringAuth(t *testing.T) {
	anotherID := func(r *pad.Rule) { r.RemoteIDs = pad.Patterns{{ID: pad.AddrID(netip.MustParseAddr("192.0.2.77"))}} }
	for name, tt := range map[string]struct {
		psk    string
		change func(*pad.Rule)
		label  string
		want   int
	}{
		"timers":            {"k", func(r *pad.Rule) { r.DPD = time.Hour }, "gate", 1},
		"another key":       {"other", nil, "gate", 0},
		"another identity":  {"k", anotherID, "gate", 0},
		"the rule is gone":  {"k", nil, "another", 0},
		"another algorithm": {"k", func(r *pad.Rule) { r.Proposals = r.Proposals[2:] }, "gate", 1}, // from the next rekeying on
	} {
		for _, side := range []string{"initiator", "responder"} {
			for _, message := range []string{"request", "response"} {
				t.Run(name+"/"+side+"/"+message, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := &network{}
						a := newNode(t, n, addrA, addrB, "k", ruleTo("k", nil, addrB))
						b := newNode(t, n, addrB, addrA, "k", ruleTo("k", nil, addrA))
						n.setDrop(func(p packet) bool {
							h, _, err := ikev2.ParseHeader(p.data)
							return err == nil && h.Exchange == ikev2.IKE_AUTH && h.IsResponse() == (message == "response")
						})
						a.acquire(1, addrA, addrB)
						time.Sleep(100 * time.Millisecond)
						synctest.Wait()
						x, peer := a, addrB
						if side == "responder" {
							x, peer = b, addrA
						}
						var now Config
						ruleTo(tt.psk, func(r *pad.Rule) {
							if tt.change != nil {
								tt.change(r)
							}
							r.Label = tt.label
						}, peer)(&now, nil)
						x.Reload(t.Context(), now.Rules, Limits{})
						synctest.Wait()
						n.setDrop(nil)
						time.Sleep(20 * time.Second)
						synctest.Wait()
						wantPair(t, a, b, tt.want)
						for _, y := range []*node{a, b} {
							if r := y.Report(t.Context()); len(r.IKESAs) != tt.want {
								t.Errorf("%v: IKE SAs %+v, want %d", y.cfg.Local, r.IKESAs, tt.want)
							}
						}
						a.stop(t)
						b.stop(t)
					})
				})
			}
		}
	}
}

// An SA whose policy goes, goes too, on both sides; one whose policy stays does
// not. However missiu tells it.
func TestPolicyGoes(t *testing.T) {
	for name, tell := range map[string]func(m *missiu){
		"one": func(m *missiu) { m.event(keysock.PolicyDeleted{Policy: m.policies[0]}) },
		"all": func(m *missiu) { m.event(keysock.PoliciesFlushed{}) },
		"transaction": func(m *missiu) {
			m.mu.Lock()
			m.policies = m.policies[1:]
			m.mu.Unlock()
			m.event(keysock.PoliciesChanged{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, a, b := pair(t)
				a.acquire(1, addrA, addrB)
				synctest.Wait()
				a.m.event(keysock.PoliciesChanged{}) // to the same
				time.Sleep(time.Second)
				synctest.Wait()
				wantPair(t, a, b, 1)
				tell(a.m)
				time.Sleep(time.Second)
				synctest.Wait()
				wantPair(t, a, b, 0)
				if r := a.Report(t.Context()); len(r.IKESAs) != 1 {
					t.Errorf("IKE SAs: %+v, want one", r.IKESAs)
				}
				a.stop(t)
				b.stop(t)
			})
		})
	}
}

// The SAs that a killed ike left are removed, and their peer has new ones at once.
func TestInheritance(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sas")
	text := "+ esp 192.0.2.2 192.0.2.1 0x00001000\nnonsense\n+ esp 192.0.2.1 192.0.2.2 0x00002000\n+ ah 192.0.2.1 192.0.2.2 0x3000\n- ah 192.0.2.1 192.0.2.2 0x3000\n+ esp x y z\n" +
		"+ addr 10.9.0.1\n+ addr 10.9.0.2\n- addr 10.9.0.2\n+ addr x\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *Journal {
		j, err := OpenJournal(path)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	j := open()
	left := func(proto ipsec.Protocol, dst netip.Addr, spi ipsec.SPI) ipsec.SAID {
		return ipsec.SAID{Proto: proto, Dst: dst, SPI: spi}
	}
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "k")
		a := newNode(t, n, addrA, addrB, "k", func(c *Config, m *missiu) {
			c.Journal = j
			for _, id := range []ipsec.SAID{left(ipsec.ESP, addrA, 0x1000), left(ipsec.ESP, addrB, 0x2000), left(ipsec.ESP, addrA, 0x4000), left(ipsec.AH, addrB, 0x3000)} {
				m.sas[id] = &ipsec.SAParams{SAID: id}
			}
			m.addrs = []netip.Prefix{netip.MustParsePrefix("10.9.0.1/32"), netip.MustParsePrefix("10.9.0.2/32")} // ours, and no longer ours
		})
		synctest.Wait()
		a.m.mu.Lock()
		for id, want := range map[ipsec.SAID]bool{
			left(ipsec.ESP, addrA, 0x1000): false, left(ipsec.ESP, addrB, 0x2000): false,
			left(ipsec.ESP, addrA, 0x4000): true, left(ipsec.AH, addrB, 0x3000): true, // not ours, and no longer ours
		} {
			if got := a.m.sas[id] != nil; got != want {
				t.Errorf("%v is there: %v, want %v", id, got, want)
			}
		}
		if len(a.m.addrs) != 1 || a.m.addrs[0].Addr().String() != "10.9.0.2" {
			t.Errorf("addresses %v, want the one that is not ours", a.m.addrs)
		}
		if len(a.m.sas) != 4 {
			t.Errorf("%d SAs, want a new pair and the two of others", len(a.m.sas))
		}
		a.m.mu.Unlock()
		if got, _ := readJournal(mustOpen(t, path)); len(got) != 2 {
			t.Errorf("journal: %v, want the new pair", got)
		}
		a.stop(t)
		b.stop(t)
	})
	if got, _ := readJournal(mustOpen(t, path)); len(got) != 0 {
		t.Errorf("journal after an orderly end: %v", got)
	}
	j.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the journal is left: %v", err)
	}
	// It does not grow for ever, and it survives being written anew.
	j = open()
	i := installed{left(ipsec.ESP, addrB, 1), addrA}
	keep := installed{left(ipsec.ESP, addrB, 2), addrA}
	j.add(keep)
	j.addAddr(addrA)
	for range 20000 {
		if err := j.add(i); err != nil {
			t.Fatal(err)
		}
		j.remove(i.id)
	}
	// Nor is it another's as long as we live.
	if other, err := OpenJournal(path); err == nil || !strings.Contains(err.Error(), "another ike") {
		t.Errorf("opened twice: %v, %v", other, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() > 100000 || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	if got, addrs := readJournal(mustOpen(t, path)); len(got) != 1 || got[keep.id] != keep.src || len(addrs) != 1 || !addrs[addrA] {
		t.Errorf("got %v, %v", got, addrs)
	}
	j.Close()
	os.Remove(path)
	if err := os.Symlink("/etc/passwd", path); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenJournal(path); err == nil {
		t.Error("a symbolic link is followed")
	}
}

func mustOpen(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// When missiu has gone before us its SAs are gone with it, and the journal is
// empty; when only the connection was lost they are removed at the end.
func TestEndWithoutMissiu(t *testing.T) {
	for name, back := range map[string]bool{"gone": false, "not gone": true} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sas")
			j, err := OpenJournal(path)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				n := &network{}
				b := newNode(t, n, addrB, addrA, "k")
				a := newNode(t, n, addrA, addrB, "k", func(c *Config, _ *missiu) { c.Journal = j })
				a.acquire(1, addrA, addrB)
				synctest.Wait()
				wantPair(t, a, b, 1)
				if got, _ := readJournal(mustOpen(t, path)); len(got) != 2 {
					t.Errorf("journal: %v", got)
				}
				if back {
					a.m.mu.Lock()
					a.m.conn.close()
					a.m.mu.Unlock()
				} else {
					a.m.setDown(true)
				}
				synctest.Wait()
				a.stop(t)
				if l := a.m.list(); len(l) != 0 {
					t.Errorf("SAs are left: %v", ids(l))
				}
				b.stop(t)
			})
			if got, _ := readJournal(mustOpen(t, path)); len(got) != 0 {
				t.Errorf("journal: %v", got)
			}
			j.Close()
		})
	}
}
