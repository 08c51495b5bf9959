package keysock

import (
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// maxMoves of an X_MIGRATE (Linux: XFRM_MAX_DEPTH).
const maxMoves = 6

// migrate is X_MIGRATE. What was done is announced to all, the sender included,
// with neither seq nor pid, as on Linux.
func (s *Server) migrate(c *conn, m *pfkey.Message) error {
	g, err := takeMigration(m)
	if err != nil {
		return err
	}
	if err := s.b.Migrate(g); err != nil {
		return err
	}
	s.moveLabels(g)
	return s.replyAll(c, &message{put: func(a *pfkey.Message, _ int) error {
		a.KMAddress = m.KMAddress
		return putMigration(a, g)
	}})
}

// takeMigration reads a policy whose requests are pairs: old end points, new ones.
func takeMigration(m *pfkey.Message) (*Migration, error) {
	w := m.Policy
	switch {
	case w == nil:
		return nil, refuse(syscall.EINVAL, "no X_POLICY extension")
	case w.Type != pfkey.PolicyIPsec || w.Dir < pfkey.DirIn || w.Dir > pfkey.DirFwd:
		return nil, refuse(syscall.EINVAL, "policy of type %v, direction %v", w.Type, w.Dir)
	case len(w.Requests) == 0 || len(w.Requests)%2 != 0 || len(w.Requests) > 2*maxMoves:
		return nil, refuse(syscall.EINVAL, "%d requests, want pairs", len(w.Requests))
	}
	g := &Migration{Dir: ipsec.Direction(w.Dir)}
	var err error
	if g.Sel, err = takeSelector(m); err != nil {
		return nil, err
	}
	type place struct{ Move }
	seen := map[place]bool{}
	for k := 0; k < len(w.Requests); k += 2 {
		was, is := w.Requests[k], w.Requests[k+1]
		if was.Proto != is.Proto || was.Mode != is.Mode || was.ReqID != is.ReqID {
			return nil, refuse(syscall.EINVAL, "requests %d and %d are no pair", k, k+1)
		}
		v := Move{
			Proto: ipsec.Protocol(was.Proto), ReqID: ipsec.ReqID(was.ReqID),
			OldSrc: was.Src, OldDst: was.Dst, NewSrc: is.Src, NewDst: is.Dst,
		}
		if v.Mode, err = modeFromWire(was.Mode); err != nil {
			return nil, err
		}
		if err := v.check(); err != nil {
			return nil, err
		}
		from := place{v}
		from.NewSrc, from.NewDst = was.Src, was.Dst
		if seen[from] {
			return nil, refuse(syscall.EINVAL, "two moves of %v to %v", v.OldSrc, v.OldDst)
		}
		seen[from] = true
		g.Moves = append(g.Moves, v)
	}
	return g, nil
}

func (v *Move) check() error {
	if v.Mode == ipsec.ModeAny {
		return refuse(syscall.EINVAL, "move without a mode")
	}
	if _, err := saTypeOf(v.Proto); err != nil || v.Proto == 0 {
		return refuse(syscall.EINVAL, "move of %v", v.Proto)
	}
	if !v.OldSrc.IsValid() || !v.NewSrc.IsValid() { // the other two are then, of the same family
		return refuse(syscall.EINVAL, "move without addresses")
	}
	for _, a := range []struct{ is4In6, none bool }{
		{v.OldSrc.Is4In6(), false},
		{v.OldDst.Is4In6(), false},
		{v.NewSrc.Is4In6(), v.NewSrc.IsUnspecified()},
		{v.NewDst.Is4In6(), v.NewDst.IsUnspecified()},
	} {
		if a.is4In6 || a.none {
			return refuse(syscall.EINVAL, "move from %v, %v to %v, %v", v.OldSrc, v.OldDst, v.NewSrc, v.NewDst)
		}
	}
	return nil
}

// putMigration makes the announcement. Its SA type is that of the first move, as
// on Linux.
func putMigration(m *pfkey.Message, g *Migration) (err error) {
	m.Type = pfkey.XMigrate
	if m.SAType, err = saTypeOf(g.Moves[0].Proto); err != nil {
		return err
	}
	if err := putSelector(m, g.Sel); err != nil {
		return err
	}
	m.Src.Proto, m.Dst.Proto = g.Sel.Proto, g.Sel.Proto // as stored: any is 0
	m.Policy = &pfkey.Policy{Type: pfkey.PolicyIPsec, Dir: pfkey.Dir(g.Dir)}
	for _, v := range g.Moves {
		q := pfkey.Request{Proto: uint16(v.Proto), Mode: pfkey.Mode(v.Mode), Level: pfkey.LevelRequire, ReqID: uint32(v.ReqID)}
		if v.ReqID != 0 {
			q.Level = pfkey.LevelUnique
		}
		was, is := q, q
		was.Src, was.Dst = v.OldSrc, v.OldDst
		is.Src, is.Dst = v.NewSrc, v.NewDst
		m.Policy.Requests = append(m.Policy.Requests, was, is)
	}
	return nil
}
