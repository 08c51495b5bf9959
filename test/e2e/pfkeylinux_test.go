package e2e

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/missiu/missiu/test/e2e/lab"
)

//go:embed testdata/pfkey-replay.py
var pfkeyReplay string

// unlike is a difference from Linux that is meant.
type unlike struct {
	step, path string // regular expressions, of the whole
	why        string
}

var unlikeLinux = []unlike{
	{"(ADD|UPDATE|DELETE|EXPIRE).*", "(sender|other) 0 ext [89]", "no keys in what all hear (RFC 2367, 3.1.2, 3.1.3)"},
	{"UPDATE of .*", "(sender|other) 0 ext 1 state", "Linux says that an SA is dead which it keeps"},
	{".*", "(sender|other) [0-9]+ ext 7", "Linux shows an SA's own selector as PROXY; there is none here"},
	{"GETSPI taken", "sender 0 errno", "EEXIST (RFC 2367, 3.1.1), where Linux says ENOENT"},
	{"(GET|ADD) of type 0", "sender 0 errno", "EINVAL: no SA is of type 0; Linux says ESRCH and EPROTONOSUPPORT"},
	{"UPDATE (with another key|in another mode)", "sender 0 errno|other", "EINVAL (RFC 2367, 3.1.3): Linux keeps key and mode, and says otherwise"},
	{"GET after those", "sender 0 ext [34] add", "what those two UPDATEs did to the lifetimes on Linux"},
	{"(ADD|GET) with Linux's flags", ".* ext 1 flags", "flags that are not carried out are not given back"},
	{"(ADD|GET) with a window of 255", ".* ext 1 replay", "Linux has no window beyond 32 by PF_KEY"},
	{"ADD of a reserved SPI", "sender 0 errno|other", "EINVAL: SPIs to 255 are reserved (RFC 4303, 2.1)"},
	{"ADD with AES-GCM", "sender 0 errno|other", "Linux has AEADs by netlink only"},
	{"(ADD|SPDADD) in mode BEET", "sender 0 errno|other", "there is no such mode here"},
	{"ADD with old encapsulation", "sender 0 errno|other", "nor the encapsulation of the draft that RFC 3948 replaced"},
	{"ADD with mapped addresses", "sender 0 errno|other", "IPv4-mapped addresses are no addresses of packets"},
	{"SPDADD require with reqid", ".* reqid", "reqids are kept at every level"},
	{"SPDADD unique with.*", ".* reqid", "and those from 0x4000 up too"},
	{"SPDADD without a request", "sender 0 errno|other", "Linux passes such packets in clear, and nobody can mean that"},
	{"ADD AH with encryption", "sender 0 errno|other", "EINVAL: AH does not encrypt"},
	{"DUMP of AH that is there", "sender", "the SA of that step"},
	{"(UPDATE|GET) IPComp", "(sender|other) 0 ext 1 replay", "IPComp has no sequence numbers"},
	{"GET with one word of extension 25", "sender 0 errno", "KMADDRESS is read wherever it stands"},
	{"ADD NAT-T without ports", "sender 0 errno|other", "EINVAL: ESP in UDP has ports"},
	{"(ADD|GET) NAT-T with an original address", "(sender|other) 0 ext 23", "it is kept, and told"},
	{"ADD NULL without integrity|ADD without integrity|ADD with authentication NULL", "sender 0 errno|other", "EINVAL: there is no protection without integrity unless the operator allows it"},
	{"SPDGET of id 7", "sender 0 errno", "ENOENT: an id is a number"},
	{"ACQUIRE.*", "other 0 ext 19", "X_SA2 is there, for strongSwan"},
	{"(GET|DUMP).*", "sender [0-9]+ ext 9", "the key of NULL has no bits, as clients send it; Linux leaves it out"},
}

// The same PF_KEY messages to a Linux kernel and to missiu: the same answers to
// the same sockets, field by field, but for the differences of unlikeLinux.
func TestPFKEYLikeLinux(t *testing.T) {
	lab.NeedRoot(t)
	if !lab.HaveUML() {
		t.Skip("package user-mode-linux is not installed")
	}
	so := preload(t)
	a, _ := lab.Pair(t)
	l := lab.BootLinux(a.Host, "uml0")
	l.Sh(`cd /usr/lib/uml/modules/$(uname -r)/kernel
		for m in net/key/af_key crypto/deflate net/xfrm/xfrm_ipcomp net/ipv4/ipcomp net/ipv6/ipcomp6; do
			insmod $m.ko 2>&1 || grep -q "^$(basename $m | tr - _) " /proc/modules
		done
		ip addr add 10.98.0.1/24 dev vec0; ip route add 10.99.0.0/16 dev vec0`)
	script := "cat >/run/replay.py <<'END'\n" + pfkeyReplay + "END\n/usr/bin/python3 /run/replay.py"
	want := replayed(t, l.Sh(script+" --kernel"))
	l.Stop()

	a.StartMissiu()
	a.Must("ip", "route", "add", "10.99.0.0/16", "dev", a.TAP(), "src", a.Addr.String())
	a.WriteFile("replay.py", pfkeyReplay, 0o644)
	got := replayed(t, a.Must("env", "LD_PRELOAD="+so, "/usr/bin/python3", "replay.py"))

	if len(got) != len(want) || len(want) < 100 {
		t.Fatalf("%d steps with missiu, %d with Linux", len(got), len(want))
	}
	used := make([]bool, len(unlikeLinux))
	for i := range want {
		name := want[i]["step"].(string)
		for _, d := range diff("", want[i], got[i]) {
			k := slices.IndexFunc(unlikeLinux, func(u unlike) bool {
				return whole(u.step).MatchString(name) && whole(u.path).MatchString(d.path)
			})
			if k >= 0 {
				used[k] = true
				continue
			}
			t.Errorf("%s: %s: Linux %s, missiu %s", name, d.path, brief(d.want), brief(d.got))
		}
	}
	for k, u := range unlikeLinux {
		if !used[k] {
			t.Errorf("no longer a difference: %s: %s (%s)", u.step, u.path, u.why)
		}
	}
}

func whole(re string) *regexp.Regexp { return regexp.MustCompile("^(?:" + re + ")$") }

func replayed(t *testing.T, out string) (steps []map[string]any) {
	t.Helper()
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		var s map[string]any
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		steps = append(steps, s)
	}
	return steps
}

type difference struct {
	path      string
	want, got any
}

// diff compares what JSON became; a path is like "sender 0 ext 1 spi".
func diff(path string, want, got any) (l []difference) {
	if reflect.DeepEqual(want, got) {
		return nil
	}
	join := func(s string) string { return strings.TrimSpace(path + " " + s) }
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			break
		}
		// An error answer has nothing else.
		if !reflect.DeepEqual(w["errno"], g["errno"]) {
			return []difference{{join("errno"), w["errno"], g["errno"]}}
		}
		keys := map[string]bool{}
		for k := range w {
			keys[k] = true
		}
		for k := range g {
			keys[k] = true
		}
		for k := range keys {
			l = append(l, diff(join(k), w[k], g[k])...)
		}
		slices.SortFunc(l, func(a, b difference) int { return strings.Compare(a.path, b.path) })
		return l
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			break
		}
		for i := range w {
			l = append(l, diff(join(fmt.Sprint(i)), w[i], g[i])...)
		}
		return l
	}
	return []difference{{path, want, got}}
}

func brief(v any) string {
	b, _ := json.Marshal(v)
	if len(b) > 300 {
		return string(b[:300]) + "…"
	}
	return string(b)
}
