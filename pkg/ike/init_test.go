package ike

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// TestInit: "sa init" negotiates when a policy is loaded, or is there when ike
// starts, without a packet, and once.
func TestInit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, b := pair(t)
		defer a.stop(t)
		defer b.stop(t)
		reload := func() {
			a.m.event(keysock.PoliciesChanged{})
			time.Sleep(time.Second)
			synctest.Wait()
		}
		reload()
		wantPair(t, a, b, 0)
		a.m.mu.Lock()
		a.m.policies[0].ID = 9
		a.m.policies[0].Flags = ipsec.PolicyInit
		a.m.mu.Unlock()
		reload()
		wantPair(t, a, b, 1)
		reload()
		wantPair(t, a, b, 1)
	})
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		b := newNode(t, n, addrB, addrA, "correct horse battery")
		a := newNode(t, n, addrA, addrB, "correct horse battery", func(_ *Config, m *missiu) { m.policies[0].Flags = ipsec.PolicyInit })
		defer a.stop(t)
		defer b.stop(t)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
	})
}

// TestLifetimes: the limits of a policy reach the SAs; those of the alternative
// that was agreed.
func TestLifetimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hard := ipsec.Lifetime{AddTime: 1000 * time.Second, Bytes: 1 << 20}
		soft := ipsec.Lifetime{AddTime: 900 * time.Second, Bytes: 900 << 10}
		_, a, b := pair(t, func(c *Config, m *missiu) {
			if c.Local[0] == addrA {
				m.policies[0].Flags = ipsec.PolicyInit
				p := &m.policies[0].Proposals[0]
				p.Hard, p.Soft = hard, soft
			}
		})
		defer a.stop(t)
		defer b.stop(t)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		wantPair(t, a, b, 1)
		for _, p := range a.m.list() {
			if p.Hard.Bytes != hard.Bytes || p.Hard.AddTime != hard.AddTime || p.Soft.Bytes == 0 || p.Soft.Bytes >= hard.Bytes ||
				p.Soft.AddTime == 0 || p.Soft.AddTime >= hard.AddTime {
				t.Errorf("SA %v has limits %+v, %+v; want %+v and less", p.SAID, p.Hard, p.Soft, hard)
			}
		}
	})
}
