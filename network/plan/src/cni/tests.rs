//! Calls as runtimes and Multus make them, and the refusals.

use super::*;

fn wire(config: Value) -> WireCall {
    let args = [("K8S_POD_NAMESPACE", "org-acme"), ("K8S_POD_NAME", "virt-launcher-a-0")];
    WireCall {
        command: "ADD".into(),
        container_id: "c0ffee".into(),
        netns: "/run/netns/cni-1".into(),
        ifname: "tap1".into(),
        args: args.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        config,
    }
}

fn refusal(call: WireCall) -> Refused {
    Call::parse(call).unwrap_err()
}

fn l2() -> Value {
    json!({"cniVersion": "1.0.0", "name": "a", "type": "kubernest-cni", "mode": "l2", "vni": 4097, "mtu": 1400,
           "runtimeConfig": {"mac": "02:00:10:01:00:0a"}})
}

#[test]
fn plan_cni_reads_the_tenant_network() {
    let Call::Add(request) = Call::parse(wire(l2())).unwrap() else {
        panic!("not ADD")
    };
    let mac = "02:00:10:01:00:0a".parse().unwrap();
    assert_eq!(
        request.attachment,
        Attachment::L2(L2 {
            vni: 4097.try_into().unwrap(),
            mtu: Some(1400),
            mac
        })
    );
    assert_eq!(request.pod.namespace, "org-acme");
}

#[test]
fn plan_cni_takes_the_mac_from_cni_args() {
    let mut config = l2();
    config["runtimeConfig"] = Value::Null;
    config.as_object_mut().unwrap().remove("runtimeConfig");
    assert_eq!(refusal(wire(config.clone())), Refused::NoMac);
    let mut call = wire(config);
    call.args.insert("MAC".into(), "02:00:10:01:00:0b".into());
    let Call::Add(request) = Call::parse(call).unwrap() else {
        panic!("not ADD")
    };
    assert!(matches!(request.attachment, Attachment::L2(L2 { mac, .. }) if mac.to_string() == "02:00:10:01:00:0b"));
}

#[test]
fn plan_cni_reads_ports_and_network_of_masquerade() {
    let config = |cni: Value| json!({"cniVersion": "1.0.0", "mode": "masquerade", "args": {"cni": cni}});
    let ports = |cni| match Call::parse(wire(config(cni)))? {
        Call::Add(Request {
            attachment: Attachment::Masquerade(m),
            ..
        }) => Ok(m.ports),
        other => panic!("{other:?}"),
    };
    assert_eq!(ports(json!({})), Ok(Ports::All));
    assert_eq!(ports(json!({"ports": []})), Ok(Ports::All));
    assert_eq!(
        ports(json!({"ports": [{"port": 6443}, {"port": 53, "protocol": "UDP"}]})),
        Ok(Ports::Listed {
            tcp: [6443].into(),
            udp: [53].into()
        })
    );
    let network = |text: &str| match Call::parse(wire(config(json!({"network": text}))))? {
        Call::Add(Request {
            attachment: Attachment::Masquerade(m),
            ..
        }) => Ok(m.network),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        network("10.10.10.0/24").map(|network| network.guest()),
        Ok([10, 10, 10, 2].into())
    );
    assert_eq!(network("127.0.0.0/8"), Err(Refused::Network("127.0.0.0/8".into())));
    for (port, protocol) in [(0, "TCP"), (65536, "TCP"), (49080, "TCP"), (49443, "TCP"), (1, "SCTP")] {
        let error = ports(json!({"ports": [{"port": port, "protocol": protocol}]})).unwrap_err();
        assert!(matches!(error, Refused::Port { port: p, .. } if p == port), "{error}");
    }
}

#[test]
fn plan_cni_refuses_by_name() {
    let set = |key: &str, value: Value| {
        let mut config = l2();
        config[key] = value;
        refusal(wire(config))
    };
    assert_eq!(set("cniVersion", json!("0.2.0")), Refused::Version("0.2.0".into()));
    assert_eq!(set("mode", json!("bridge")), Refused::Mode("bridge".into()));
    assert_eq!(set("vni", json!(0)), Refused::Vni(NameError::Vni(0)));
    assert_eq!(set("vni", Value::Null), Refused::NoVni);
    assert_eq!(set("mtu", json!(1279)), Refused::Mtu(1279));
    assert!(matches!(set("vni", json!("4097")), Refused::Config(_)));
    let multicast = json!({"mac": "01:00:5e:00:00:01"});
    assert!(matches!(
        set("runtimeConfig", multicast),
        Refused::Mac(NameError::MacNotUnicast(_))
    ));
    assert_eq!(
        refusal(WireCall {
            netns: String::new(),
            ..wire(l2())
        }),
        Refused::NoNetns
    );
    assert!(matches!(
        refusal(WireCall {
            ifname: "eth0".into(),
            ..wire(l2())
        }),
        Refused::Interface(_)
    ));
    for id in ["", "../../etc/cron.d/x", "a/b", ".hidden"] {
        assert_eq!(
            refusal(WireCall {
                container_id: id.into(),
                ..wire(l2())
            }),
            Refused::ContainerId(id.into())
        );
    }
    let mut call = wire(l2());
    call.args.remove("K8S_POD_NAMESPACE");
    assert_eq!(refusal(call), Refused::NoPod("K8S_POD_NAMESPACE"));
}

#[test]
fn plan_cni_never_refuses_del_for_its_configuration() {
    let del = |ifname: &str| {
        let call = WireCall {
            command: "DEL".into(),
            ifname: ifname.into(),
            netns: String::new(),
            ..wire(json!(1))
        };
        Call::parse(call).unwrap()
    };
    let removal = Removal {
        container_id: "c0ffee".into(),
        netns: None,
        tap: "tap1".parse().unwrap(),
    };
    assert_eq!(del("tap1"), Call::Del(Some(removal)));
    assert_eq!(del("net1"), Call::Del(None));
}

#[test]
fn admit_only_networks_of_the_pods_namespace() {
    let vni = 4097.try_into().unwrap();
    let pod = Pod {
        namespace: "org-acme".into(),
        name: "p".into(),
    };
    assert_eq!(admit(vni, Some("org-acme"), &pod), Ok(()));
    assert_eq!(admit(vni, None, &pod), Err(Refused::NotAllocated(vni)));
    let refused = admit(vni, Some("org-bmce"), &pod).unwrap_err();
    assert!(!refused.to_string().contains("org-bmce"), "{refused}");
}

#[test]
fn plan_cni_result_has_the_tap_and_no_address() {
    let Call::Add(request) = Call::parse(wire(l2())).unwrap() else {
        panic!("not ADD")
    };
    let tap = json!({"name": "tap1", "mac": "fe:00:00:00:00:01", "sandbox": "/run/netns/cni-1"});
    let result = json!({"cniVersion": "1.0.0", "interfaces": [tap], "dns": {}});
    assert_eq!(added(&request, "fe:00:00:00:00:01"), result);
}
