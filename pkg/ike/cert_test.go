package ike

import (
	"crypto/x509"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/proto/ikev2"
)

// A peer that a new CRL revokes goes when the files are read again; whose files
// say the same stays.
func TestReloadCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := credtest.CA("CA", credtest.Key("p256", 0))
		ends := map[string]*credtest.Cert{}
		for i, name := range []string{"a.example", "b.example"} {
			ends[name] = ca.Issue(name, credtest.Key("p256", i+1), credtest.Names(name))
		}
		policy := cred.Policy{Hashes: []ikev2.HashID{ikev2.HashSHA256}}
		db := func(me, peer string, crl []byte) *pad.DB {
			t.Helper()
			own, err := cred.NewOwn([]*x509.Certificate{ends[me].Certificate}, ends[me].Key, policy)
			if err != nil {
				t.Fatal(err)
			}
			c := cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: policy}
			if crl != nil {
				if c.CRLs, err = cred.ParseCRLs(crl); err != nil {
					t.Fatal(err)
				}
			}
			r := pad.NewRule("peer")
			r.Remote, r.LocalAuth, r.RemoteAuth, r.Own = pad.Any(), pad.Cert, pad.Cert, own
			r.LocalID, r.RemoteIDs = pad.ID{Type: ikev2.IDFQDN, Data: me}, pad.Patterns{{ID: pad.ID{Type: ikev2.IDFQDN, Data: peer}}}
			if r.Trust, err = cred.NewTrust(c); err != nil {
				t.Fatal(err)
			}
			d, err := pad.NewDB([]*pad.Rule{r})
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		n := &network{}
		a := newNode(t, n, addrA, addrB, "unused", func(c *Config, _ *missiu) { c.Rules = db("a.example", "b.example", nil) })
		b := newNode(t, n, addrB, addrA, "unused", func(c *Config, _ *missiu) { c.Rules = db("b.example", "a.example", nil) })
		a.acquire(1, addrA, addrB)
		synctest.Wait()
		wantPair(t, a, b, 1)
		now := time.Now()
		a.Reload(t.Context(), db("a.example", "b.example", ca.CRL(now, now.Add(time.Hour), nil, ends["a.example"])), Limits{})
		time.Sleep(time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
		a.Reload(t.Context(), db("a.example", "b.example", ca.CRL(now, now.Add(time.Hour), nil, ends["b.example"])), Limits{})
		time.Sleep(time.Second)
		synctest.Wait()
		wantPair(t, a, b, 0)
		if got := len(a.logs.FilterMessage("rule no longer permits this peer").All()); got != 1 {
			t.Errorf("%d lines about it", got)
		}
		a.stop(t)
		b.stop(t)
	})
}

// Before the peer's certificate expires there is another IKE SA, by the one that the
// peer has by then; without one the IKE SA ends with it.
func TestCertificateExpires(t *testing.T) {
	for name, renewed := range map[string]bool{"renewed": true, "not renewed": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := credtest.CA("CA", credtest.Key("p256", 0))
				issue := func(name string, life time.Duration) *credtest.Cert {
					return ca.Issue(name, credtest.Key("p256", 1), credtest.Names(name), credtest.Valid(time.Now().Add(-time.Hour), time.Now().Add(life)))
				}
				policy := cred.Policy{Hashes: []ikev2.HashID{ikev2.HashSHA256}}
				db := func(me *credtest.Cert, peer string) *pad.DB {
					own, err := cred.NewOwn([]*x509.Certificate{me.Certificate}, me.Key, policy)
					if err != nil {
						t.Fatal(err)
					}
					r := pad.NewRule("peer")
					r.Remote, r.LocalAuth, r.RemoteAuth, r.Own = pad.Any(), pad.Cert, pad.Cert, own
					r.LocalID, r.RemoteIDs = pad.ID{Type: ikev2.IDFQDN, Data: me.DNSNames[0]}, pad.Patterns{{ID: pad.ID{Type: ikev2.IDFQDN, Data: peer}}}
					if r.Trust, err = cred.NewTrust(cred.TrustConfig{CAs: []*x509.Certificate{ca.Certificate}, Policy: policy}); err != nil {
						t.Fatal(err)
					}
					d, err := pad.NewDB([]*pad.Rule{r})
					if err != nil {
						t.Fatal(err)
					}
					return d
				}
				n := &network{}
				a := newNode(t, n, addrA, addrB, "unused", func(c *Config, _ *missiu) { c.Rules = db(issue("a.example", 20*time.Hour), "b.example") })
				b := newNode(t, n, addrB, addrA, "unused", func(c *Config, _ *missiu) { c.Rules = db(issue("b.example", time.Hour), "a.example") })
				a.acquire(1, addrA, addrB)
				synctest.Wait()
				wantPair(t, a, b, 1)
				ike := a.Report(t.Context()).IKESAs[0].SPILocal
				least := 99
				a.m.mu.Lock()
				a.m.trace = func(string) { least = min(least, len(a.m.sas)) }
				a.m.mu.Unlock()
				time.Sleep(50 * time.Minute)
				synctest.Wait()
				if r := a.Report(t.Context()); len(r.IKESAs) != 1 || r.IKESAs[0].SPILocal != ike {
					t.Errorf("too early: %+v", r.IKESAs)
				}
				if renewed {
					b.rules.Store(db(issue("b.example", 20*time.Hour), "a.example"))
				}
				time.Sleep(20 * time.Minute)
				synctest.Wait()
				if !renewed {
					wantPair(t, a, b, 0)
				} else if wantPair(t, a, b, 1); least < 2 || a.Report(t.Context()).IKESAs[0].SPILocal == ike {
					t.Errorf("the same IKE SA, or down to %d SAs", least)
				}
				if got := a.logs.FilterMessage("reauthentication").Len(); got > 2 {
					t.Errorf("%d attempts", got)
				}
				a.stop(t)
				b.stop(t)
			})
		})
	}
}
