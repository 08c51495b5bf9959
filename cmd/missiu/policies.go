package main

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keyengine"
	"github.com/missiu/missiu/pkg/keysock"
)

// settle is how long the policies rest before they are saved: files of many
// entries and strangers' daemons change them one by one.
const settle = 50 * time.Millisecond

// recorder is the key engine with an ear for changes of the policies.
type recorder struct {
	*keyengine.Engine
	changed chan struct{}
	reroute func(atOnce bool)
}

func newRecorder(e *keyengine.Engine, reroute func(atOnce bool)) *recorder {
	return &recorder{e, make(chan struct{}, 1), reroute}
}

// note tells of a change, but not of one in a transaction, whose Commit is the
// change: a load of many entries would otherwise be saved over and over. Changes
// of many entries are routed at once.
func (r *recorder) note(conn uint64, err error, atOnce bool) {
	if err == nil && !r.Drafting(conn) {
		r.reroute(atOnce)
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
}

func (r *recorder) AddPolicy(conn uint64, p *ipsec.Policy) (*keysock.PolicyInfo, error) {
	i, err := r.Engine.AddPolicy(conn, p)
	r.note(conn, err, false)
	return i, err
}

func (r *recorder) UpdatePolicy(conn uint64, p *ipsec.Policy) (*keysock.PolicyInfo, error) {
	i, err := r.Engine.UpdatePolicy(conn, p)
	r.note(conn, err, false)
	return i, err
}

func (r *recorder) DeletePolicy(conn uint64, dir ipsec.Direction, sel ipsec.Selector) (*keysock.PolicyInfo, error) {
	i, err := r.Engine.DeletePolicy(conn, dir, sel)
	r.note(conn, err, false)
	return i, err
}

func (r *recorder) DeletePolicyID(conn uint64, id uint32) (*keysock.PolicyInfo, error) {
	i, err := r.Engine.DeletePolicyID(conn, id)
	r.note(conn, err, false)
	return i, err
}

func (r *recorder) FlushPolicies(conn uint64) bool {
	removed := r.Engine.FlushPolicies(conn)
	r.note(conn, nil, true)
	return removed
}

func (r *recorder) Commit(conn uint64) error {
	err := r.Engine.Commit(conn)
	r.note(conn, err, true)
	return err
}

// restore puts the policies of a killed predecessor in force again.
func (r *recorder) restore(ps []ipsec.Policy) error {
	for i := range ps {
		if _, err := r.Engine.AddPolicy(0, &ps[i]); err != nil {
			return err
		}
	}
	return nil
}

// save writes the policies to the state file whenever they have changed.
func (r *recorder) save(ctx context.Context, ifname string, do func(func()), log *zap.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.changed:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(settle):
		}
		got := make(chan []ipsec.Policy, 1)
		do(func() {
			infos := r.Engine.Policies(0)
			ps := make([]ipsec.Policy, len(infos))
			for i, p := range infos {
				ps[i] = p.Policy
			}
			got <- ps
		})
		select {
		case <-ctx.Done():
			return
		case ps := <-got:
			if err := savePolicies(ifname, ps); err != nil {
				log.Error("policies not saved: after a crash they would be missing", zap.Error(err))
			}
		}
	}
}
