package pfkey

import (
	"fmt"
	"strings"
)

// String shows the whole message on one line, keys by their length.
func (m *Message) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v satype=%v seq=%d pid=%d", m.Type, m.SAType, m.Seq, m.Pid)
	if m.Errno != 0 {
		fmt.Fprintf(&b, " errno=%d", m.Errno)
	}
	for _, t := range order {
		if s := m.slot(t, true); s != nil {
			fmt.Fprintf(&b, " %v%v", t, s)
		}
	}
	return b.String()
}

func (f field[T, P]) String() string { return strings.TrimPrefix(fmt.Sprintf("%+v", *f.p), "&") }
