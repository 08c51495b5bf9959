package keysock

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
)

// TestBatch: many policies in order, more than are in flight at a time; the
// first refusal counts and says which it is; the client works on after it.
func TestBatch(t *testing.T) {
	r := start(t, ServerOptions{})
	c := r.dial()
	ctx := r.ctx()
	var ps []*ipsec.Policy
	for k := range 5 * inFlight {
		p := policy(1)
		p.Sel.Dst = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(k >> 8), byte(k)}), 32)
		ps = append(ps, p)
	}
	if got, err := c.AddPolicies(ctx, nil); err != nil || len(got) != 0 {
		t.Errorf("no policies: %v, %v", got, err)
	}
	got, err := c.AddPolicies(ctx, ps)
	if err != nil {
		t.Fatal(err)
	}
	var ids []uint32
	for k, p := range got {
		if p.Sel != ps[k].Sel || k > 0 && p.ID <= got[k-1].ID {
			t.Fatalf("answer %d is %v with ID %d", k, p.Sel, p.ID)
		}
		ids = append(ids, p.ID)
	}
	if got, err = c.UpdatePolicies(ctx, ps); err != nil || got[7].ID != ids[7] {
		t.Errorf("update: %v, ID %d, want %d", err, got[7].ID, ids[7])
	}
	// One that exists, in the middle and twice.
	more := append([]*ipsec.Policy(nil), ps...)
	for k := range more {
		if k != 100 && k != 120 {
			p := *more[k]
			p.Sel.DstPort = 99
			more[k] = &p
		}
	}
	_, err = c.AddPolicies(ctx, more)
	var be *BatchError
	if !errors.As(err, &be) || be.Index != 100 || !errors.Is(err, syscall.EEXIST) {
		t.Errorf("got %v, want EEXIST of request 100", err)
	}
	if err := c.DeletePolicyIDs(ctx, ids); err != nil {
		t.Error(err)
	}
	if err := c.DeletePolicyIDs(ctx, []uint32{0xfffff0}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v, want ENOENT", err)
	}
	if _, err := c.DumpPolicies(ctx); err != nil {
		t.Error(err)
	}
}
