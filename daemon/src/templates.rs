//! Templates: images that stay until somebody removes them.
use std::sync::Arc;

use xenfold::control::{ErrorCode, Refusal, TemplateInfo};
use xenfold::page::ContentId;

use crate::daemon::{Daemon, store_failed};
use crate::membership::canonical;
use crate::store::{COMMON, Group};

fn refusal(code: ErrorCode, message: String) -> Refusal {
    Refusal { code, message }
}

/// Makes a template of the guest's newest image, in the group that has it.
pub fn add(daemon: &Daemon, name: &str, guest_uuid: &str) -> Result<(), Refusal> {
    if name == COMMON {
        let message = format!("{COMMON} is the name of the template that a group makes by itself: take another");
        return Err(refusal(ErrorCode::BadRequest, message));
    }
    let uuid = canonical(guest_uuid)
        .ok_or_else(|| refusal(ErrorCode::BadRequest, format!("{guest_uuid:?} is no guest's UUID")))?;
    let mut newest: Option<(u64, Arc<Group>)> = None;
    for (_, group) in daemon.open_groups()? {
        // A guest that changed groups has an image in each.
        let images = group.images().map_err(store_failed)?;
        let image = images.iter().find(|image| image.guest == uuid && !image.template);
        if let Some(image) = image
            && newest.as_ref().is_none_or(|(saved, _)| *saved < image.saved_unix_s)
        {
            newest = Some((image.saved_unix_s, group));
        }
    }
    let image = match &newest {
        Some((_, group)) => group.image(&uuid).map_err(store_failed)?,
        None => None,
    };
    let (Some((_, group)), Some(image)) = (newest, image) else {
        let message = format!("there is no image of guest {uuid} on this host: one is kept when it migrates");
        return Err(refusal(ErrorCode::NotFound, message));
    };
    let ids: Vec<ContentId> = image.pages.iter().map(|(_, id)| *id).collect();
    group.add_template(name, &ids, image.saved_unix_s).map_err(store_failed)
}

/// All templates of all groups.
pub fn list(daemon: &Daemon) -> Result<Vec<TemplateInfo>, Refusal> {
    let mut found = Vec::new();
    for (name, group) in daemon.open_groups()? {
        let images = group.images().map_err(store_failed)?;
        let templates = images.into_iter().filter(|image| image.template);
        found.extend(templates.map(|image| TemplateInfo {
            name: image.guest,
            group: name.clone(),
            saved_unix_s: image.saved_unix_s,
            pages: image.pages,
        }));
    }
    found.sort_by(|a, b| (&a.name, &a.group).cmp(&(&b.name, &b.group)));
    Ok(found)
}

/// Removes a template; `group` says which where several have that name.
pub fn remove(daemon: &Daemon, name: &str, group: Option<&str>) -> Result<(), Refusal> {
    let mut found = Vec::new();
    for (in_group, handle) in daemon.open_groups()? {
        if group.is_some_and(|wanted| wanted != in_group) {
            continue;
        }
        let images = handle.images().map_err(store_failed)?;
        if images.iter().any(|image| image.template && image.guest == name) {
            found.push((in_group, handle));
        }
    }
    match found.as_slice() {
        [] => Err(refusal(
            ErrorCode::NotFound,
            format!("there is no template {name} on this host"),
        )),
        [(_, group)] => group.remove_template(name).map(|_| ()).map_err(store_failed),
        several => {
            let groups: Vec<&str> = several.iter().map(|(group, _)| group.as_str()).collect();
            let message = format!("several groups have a template {name}: {}; name one", groups.join(", "));
            Err(refusal(ErrorCode::Ambiguous, message))
        }
    }
}
