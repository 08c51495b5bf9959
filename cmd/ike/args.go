package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/config/ikeconf"
	"github.com/missiu/missiu/pkg/crypto/alg"
)

const defaultConf = "/etc/missiu/ike.conf"

const usage = `usage: ike [options] local_ip_addr ...
       ike status [--json]
       ike up|down|rekey [--timeout TIME] RULE
       ike explain [-f FILE] [-a ADDRESS] CAPTURE

The key daemon of missiu: IKEv2 on UDP ports 500 and 4500 of the given local
addresses. It stays in the foreground. With a word in place of the address: a
command for the ike that runs, see ike COMMAND --help.

  -f FILE   configuration file (default ` + defaultConf + `)
  -n        check the configuration, report, exit
  -show     the same, and print the rules in force with every default
  -c PEER   negotiate with PEER at start; may be repeated
  -v 2      IKE version
  -p @FILE  pre-shared key from FILE (mode 0600; @- is standard input);
            only the rule of the command line is in force, unless -f is given
  -P @FILE  the same, and the default configuration file is in force too
  -g GROUPS key exchange of the rule of -p, such as 14 or x25519,ecp256
  -l TIME   lifetime of IKE SAs    (a number with s, m, h or d; seconds)
  -L TIME   lifetime of child SAs
  -d TIME   dead peer interval     (minutes, or with a unit; 0 is never)
  -i IF     instance of missiu, if several run
  --keylog FILE
            write the keys of every SA to FILE (mode 0600), for Wireshark
  -o FILE   append the log to FILE instead of standard error
  -h        this help
  -V        version

Signals: TERM, INT stop; HUP reads the files again; USR1 logs the state.
Exit status: 0 done, 1 could not run, 2 bad command line, 3 bad configuration.
`

// options are the command line.
type options struct {
	local     []netip.Addr
	connect   []netip.Addr
	file      string // -f, or the default where it is in force; "" for none
	fileGiven bool
	check     bool
	show      bool
	secret    string // value of -p or -P
	secretOpt string // "-p" or "-P"
	groups    []alg.KE
	ikeLife   time.Duration
	childLife time.Duration
	dpd       time.Duration
	dpdSet    bool
	ifname    string
	logFile   string
	keyLog    string
	help      bool
	version   bool
}

// parseArgs reads the command line; every error is one of usage.
func parseArgs(args []string) (*options, error) {
	o := &options{}
	if len(args) > 0 && args[0] == "?" {
		o.help = true
		return o, nil
	}
	fs := flag.NewFlagSet("ike", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.Func("f", "", func(s string) error { o.file, o.fileGiven = s, true; return nonEmpty(s) })
	fs.BoolVar(&o.check, "n", false, "")
	fs.BoolVar(&o.show, "show", false, "")
	fs.BoolVar(&o.version, "V", false, "")
	fs.Func("c", "", func(s string) error {
		a, err := addr(s)
		o.connect = append(o.connect, a)
		return err
	})
	fs.Func("v", "", func(s string) error {
		switch s {
		case "2":
			return nil
		case "1":
			return errors.New("IKEv1 is not supported; use -v 2")
		}
		return errors.New("want 2")
	})
	fs.Func("m", "", func(s string) error {
		if s != "" && (strings.HasPrefix("main", s) || strings.HasPrefix("aggressive", s)) {
			return errors.New("a mode of IKEv1, which is not supported; IKEv2 has none")
		}
		return errors.New("want main or aggressive")
	})
	for _, name := range []string{"p", "P"} {
		fs.Func(name, "", func(s string) error {
			if o.secretOpt != "" {
				return fmt.Errorf("given twice; first as %s", o.secretOpt)
			}
			o.secret, o.secretOpt = s, "-"+name
			return nil
		})
	}
	fs.Func("g", "", func(s string) (err error) {
		o.groups, err = ikeconf.Groups(s)
		return err
	})
	fs.Func("l", "", func(s string) error { return lifetime(s, &o.ikeLife) })
	fs.Func("L", "", func(s string) error { return lifetime(s, &o.childLife) })
	fs.Func("d", "", func(s string) (err error) {
		if o.dpd, err = duration(s, time.Minute); err == nil && o.dpd > 24*time.Hour {
			err = errors.New("want a time up to a day")
		}
		o.dpdSet = true
		return err
	})
	fs.Func("i", "", func(s string) error { o.ifname = s; return nonEmpty(s) })
	fs.Func("o", "", func(s string) error { o.logFile = s; return nonEmpty(s) })
	fs.Func("keylog", "", func(s string) error { o.keyLog = s; return nonEmpty(s) })
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		o.help = true
		return o, nil
	case err != nil:
		// flag's own text quotes the value, which may be a key.
		return nil, errors.New(hideValue(err.Error()))
	}
	if o.version {
		return o, nil
	}
	for _, s := range fs.Args() {
		a, err := addr(s)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s, err)
		}
		o.local = append(o.local, a)
	}
	o.check = o.check || o.show
	if len(o.local) == 0 && !o.check {
		return nil, errors.New("no local address")
	}
	if o.groups != nil && o.secretOpt == "" {
		return nil, errors.New("-g: for the rule of -p or -P; rules of a file have ikesa_xform")
	}
	if !o.fileGiven && o.secretOpt != "-p" {
		o.file = defaultConf
	}
	return o, nil
}

// hideValue cuts the value of -p and -P out of an error text of package flag.
func hideValue(s string) string {
	for _, opt := range []string{"-p", "-P"} {
		if i := strings.Index(s, "for flag "+opt+":"); i >= 0 {
			return opt + s[i+len("for flag "+opt):]
		}
	}
	return s
}

func nonEmpty(s string) error {
	if s == "" {
		return errors.New("empty")
	}
	return nil
}

func addr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, errors.New("want an IP address")
	}
	return a.Unmap(), nil
}

func lifetime(s string, d *time.Duration) error {
	v, err := duration(s, time.Second)
	if err != nil {
		return err
	}
	if v < 10*time.Second || v > 7*24*time.Hour {
		return errors.New("want a time from 10 to 604800 seconds")
	}
	*d = v
	return nil
}

// duration reads a number with an optional unit of s, m, h, d.
func duration(s string, unit time.Duration) (time.Duration, error) {
	n := s
	if i := strings.IndexAny(s, "smhd"); i >= 0 && i == len(s)-1 {
		unit = map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour}[s[i]]
		n = s[:i]
	}
	v, err := strconv.ParseUint(n, 10, 31)
	if err != nil || len(n) > 1 && n[0] == '0' {
		return 0, errors.New("want a time such as 3600, 90s, 30m or 8h")
	}
	return time.Duration(v) * unit, nil
}
