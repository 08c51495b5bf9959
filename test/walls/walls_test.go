package walls

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/missiu/missiu"

// pkg is what `go list -json` tells of a package.
type pkg struct {
	ImportPath string
	Standard   bool
	Imports    []string // direct
	Deps       []string // transitive
}

// Do not change this data to fix a build.
//
// A pattern is a path below the module, or, with a dot in its first element,
// of another module. It holds for the package and for all below it.
var walls = []struct {
	from string
	why  string
	// never: not reached, not even through others.
	never []string
	// onlyOurs: the only packages of this module reached; nil does not limit.
	onlyOurs []string
}{
	{from: "proto", why: "wire formats know nothing of us", onlyOurs: []string{"proto"}},
	{from: "pkg/ipsec", why: "nouns compute nothing", onlyOurs: []string{"pkg/ipsec", "pkg/crypto/alg"}},
	{from: "pkg/crypto/alg", why: "identities depend on nothing", onlyOurs: []string{"pkg/crypto/alg"}},
	{from: "pkg/crypto", why: "both daemons compute with it", onlyOurs: []string{"pkg/crypto", "pkg/ipsec"}},
	{
		from: "cmd/missiu", why: "missiu speaks no IKE and reads no policy files",
		never: []string{"proto/isakmp", "proto/ikev1", "proto/ikev2", "pkg/ike", "pkg/config", "pkg/crypto/dh", "pkg/crypto/keymat"},
	},
	{
		from: "pkg/datapath", why: "as missiu",
		never: []string{"proto/isakmp", "proto/ikev1", "proto/ikev2", "pkg/ike", "pkg/config", "pkg/crypto/dh", "pkg/crypto/keymat"},
	},
	{
		from: "pkg/keyengine", why: "as missiu",
		never: []string{"proto/isakmp", "proto/ikev1", "proto/ikev2", "pkg/ike", "pkg/config", "pkg/crypto/dh", "pkg/crypto/keymat"},
	},
	{from: "cmd/ike", why: "ike sees no data packet and holds no SAD", never: []string{"pkg/datapath", "pkg/keyengine"}},
	{from: "pkg/ike", why: "as ike", never: []string{"pkg/datapath", "pkg/keyengine"}},
	{
		from: "cmd/loadconfig", why: "loadConfig parses, checks and applies; it keeps no state",
		onlyOurs: []string{"cmd/loadconfig", "pkg/config", "pkg/keysock", "proto/pfkey", "pkg/ipsec", "pkg/crypto/alg"},
	},
	{from: "pkg/config", why: "configuration is read without a daemon", never: []string{"pkg/datapath", "pkg/keyengine", "pkg/ike/sa", "pkg/natt"}},
	{from: "pkg/config/lexer", why: "tokens know no meaning", onlyOurs: []string{"pkg/config/lexer"}},
	{from: "pkg/config/ipsecconf", why: "as loadConfig", onlyOurs: []string{"pkg/config/ipsecconf", "pkg/config/lexer", "pkg/ipsec", "pkg/crypto/alg"}},
	{from: "pkg/keysock", why: "PF_KEY in our nouns, and no more", onlyOurs: []string{"pkg/keysock", "proto/pfkey", "pkg/ipsec", "pkg/crypto/alg"}},
	{from: "pkg/attach", why: "sockets know no packets", onlyOurs: []string{"pkg/attach"}},
	{from: "pkg/capture", why: "who looks at frames does not move them", onlyOurs: []string{"pkg/capture", "pkg/attach", "pkg/datapath/packet", "pkg/ipsec", "pkg/crypto/alg"}},
	{from: "pkg/ike/dn", why: "names know nothing of certificates", onlyOurs: []string{"pkg/ike/dn"}},
	{from: "pkg/ike/cred", why: "certificates know nothing of rules", onlyOurs: []string{"pkg/ike/cred", "pkg/ike/dn", "proto"}},
	{from: "pkg/ike/sa", why: "the state machine does no I/O and does not log", never: []string{"pkg/keysock", "pkg/natt", "go.uber.org/zap"}},
}

// Do not change this data to fix a build.
//
// importers: who alone may import the library directly.
var importers = []struct {
	lib     string
	allowed []string
}{
	{"github.com/songgao/water", []string{"pkg/datapath/tap"}},
	{"github.com/vishvananda/netlink", []string{"pkg/datapath/tap", "pkg/datapath/wire", "pkg/datapath/bump"}},
	{"github.com/google/nftables", []string{"pkg/datapath/wire"}},
	{"github.com/gaissmai/bart", []string{"pkg/datapath/spd", "pkg/datapath/wire"}}, // prefixes of policies, and of the divert set
	{"github.com/spf13/pflag", []string{"cmd"}},
	{"github.com/youmark/pkcs8", []string{"pkg/ike/cred"}},
}

// Do not change this data to fix a build.
//
// logs: the daemons and engines that alone may log. Lower rooms return values
// and errors.
var logs = []string{"pkg/daemon", "pkg/datapath", "pkg/ike", "pkg/keyengine", "cmd"}

// Do not change this data to fix a build.
//
// silent: below logs, rooms that do not log all the same.
var silent = []string{
	"pkg/datapath/packet", "pkg/datapath/gro", "pkg/datapath/tap", "pkg/datapath/wire", "pkg/datapath/bump", "pkg/datapath/neigh", "pkg/datapath/frag",
	"pkg/datapath/replay", "pkg/datapath/esp", "pkg/datapath/ah", "pkg/datapath/sad", "pkg/datapath/spd",
	"pkg/ike/sa", "pkg/ike/isakmpsa", "pkg/ike/proposal", "pkg/ike/pad", "pkg/ike/cred", "pkg/ike/dn", "cmd/loadconfig",
}

func TestWalls(t *testing.T) {
	pkgs := list(t)
	for _, p := range pkgs {
		if p.Standard {
			continue
		}
		name, ours := below(p.ImportPath)
		if !ours {
			continue
		}
		for _, w := range walls {
			if !within(name, w.from) {
				continue
			}
			for _, d := range p.Deps {
				dn, dours := below(d)
				if dours && w.onlyOurs != nil && !anyOf(dn, w.onlyOurs) {
					t.Errorf("%s reaches %s: %s", name, dn, w.why)
				}
				if anyOf(dn, w.never) {
					t.Errorf("%s reaches %s: %s", name, dn, w.why)
				}
			}
		}
		for _, i := range importers {
			if anyOf(name, i.allowed) {
				continue
			}
			for _, d := range p.Imports {
				if within(d, i.lib) {
					t.Errorf("%s imports %s, which only %v may", name, d, i.allowed)
				}
			}
		}
		for _, d := range p.Imports {
			if within(d, "go.uber.org/zap") && (!anyOf(name, logs) || anyOf(name, silent)) {
				t.Errorf("%s logs; it should return values and errors", name)
			}
		}
	}
}

// A wall around a room of another name would assert nothing.
func TestWallsStand(t *testing.T) {
	pkgs := list(t)
	for _, w := range walls {
		found := false
		for _, p := range pkgs {
			if name, ours := below(p.ImportPath); ours && within(name, w.from) {
				found = true
			}
		}
		if !found {
			t.Errorf("no package at %s", w.from)
		}
	}
}

// list tells of all packages of the module and of what they are made from.
// Tests' own imports are not walls' business.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard,Imports,Deps", "./...")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "GOOS=linux", "GOFLAGS=-mod=readonly")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// below cuts the module's path off; ours is false for packages of others,
// whose name stays as it is.
func below(path string) (name string, ours bool) {
	if path == module {
		return ".", true
	}
	if rest, ok := strings.CutPrefix(path, module+"/"); ok {
		return rest, true
	}
	return path, false
}

func within(name, room string) bool {
	return name == room || strings.HasPrefix(name, room+"/")
}

func anyOf(name string, rooms []string) bool {
	for _, r := range rooms {
		if within(name, r) {
			return true
		}
	}
	return false
}
