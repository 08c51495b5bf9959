package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/missiu/missiu/pkg/config/ikeconf"
	"github.com/missiu/missiu/pkg/ike/explain"
	"github.com/spf13/pflag"
)

// explainFile says of the IKE_SA_INITs in a capture how this configuration would
// answer them. It needs no privilege: the secrets are not read.
func explainFile(args []string, stdout, stderr io.Writer) int {
	fs := pflag.NewFlagSet("ike explain", pflag.ContinueOnError)
	fs.SortFlags = false
	fs.SetOutput(stdout)
	conf := fs.StringP("file", "f", defaultConf, "configuration file")
	addrs := fs.StringArrayP("address", "a", nil, "an address of ours, may be repeated; without it every receiver is taken for us")
	fs.Usage = func() {
		fmt.Fprintf(stdout, "usage: ike explain [options] CAPTURE\n\nCAPTURE is in pcap or pcapng format, - is standard input.\n\n%s", fs.FlagUsages())
	}
	usage := func(err error) int {
		fmt.Fprintf(stderr, "ike explain: %v\nike explain: see ike explain --help\n", err)
		return exitUsage
	}
	switch err := fs.Parse(args[1:]); {
	case errors.Is(err, pflag.ErrHelp):
		return exitOK
	case err != nil:
		return usage(err)
	case fs.NArg() != 1:
		return usage(errors.New("want one capture"))
	}
	c := explain.Config{}
	for _, s := range *addrs {
		a, err := addr(s)
		if err != nil {
			return usage(fmt.Errorf("%q: %w", s, err))
		}
		c.Local = append(c.Local, a)
	}
	if exit := rulesOf(*conf, &c, stderr); exit != exitOK {
		return exit
	}
	var in io.Reader = os.Stdin
	if name := fs.Arg(0); name != "-" {
		f, err := os.Open(name)
		if err != nil {
			fmt.Fprintf(stderr, "ike explain: %v\n", err)
			return exitFailed
		}
		defer f.Close()
		in = f
	}
	w := bufio.NewWriter(stdout)
	err := explain.Capture(w, in, c)
	if ferr := w.Flush(); err == nil {
		err = ferr
	}
	if err != nil {
		fmt.Fprintf(stderr, "ike explain: %s: %v\n", fs.Arg(0), err)
		return exitFailed
	}
	return exitOK
}

// rulesOf reads the rules of a configuration, which must be one that ike starts
// with, but for the secrets.
func rulesOf(path string, c *explain.Config, stderr io.Writer) int {
	conf, ds := ikeconf.ParseRules(ikeconf.OS{}, path, "")
	if conf != nil {
		ds = append(ds, ikeconf.Unsupported(conf)...)
	}
	for _, d := range ds {
		fmt.Fprintln(stderr, d)
	}
	if ikeconf.Failed(ds) {
		return exitConfig
	}
	c.Rules, c.IKEPort, c.NATTPort = conf.Rules(c.Local), conf.IKEPort, conf.NATTPort
	return exitOK
}
